"""CETT: the golden numbers, and every threshold of the sorted curve against sums taken neuron by neuron."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megastab.analysis import cett
from megastab.analysis.cett import largest_within, neuron_lengths, tail_curve


def dense(activations_NF: Tensor, down_DF: Tensor, threshold: float) -> tuple[float, float]:
    """(CETT, sparsity) by the definition, a token and a neuron at a time."""
    errors, left_out = [], 0
    for token in activations_NF.double():
        tail, whole = torch.zeros(len(down_DF), dtype=torch.float64), torch.zeros(len(down_DF), dtype=torch.float64)
        for a, column in zip(token, down_DF.double().t(), strict=True):
            whole += a * column
            if float(abs(a) * column.norm()) < threshold:
                tail, left_out = tail + a * column, left_out + 1
        if float(whole.norm()) > 0:
            errors.append(float(tail.norm() / whole.norm()))
    return (math.fsum(errors) / len(errors) if errors else 0.0), left_out / activations_NF.numel()


def random(tokens: int, neurons: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    sizes = {"generator": draw, "dtype": torch.float64}
    return torch.randn(tokens, neurons, **sizes) ** 3, torch.randn(width, neurons, **sizes)


def test_golden_numbers() -> None:
    a, down = torch.tensor([[2, 0.5, -0.1, 0.05]], dtype=torch.float64), torch.tensor([[1.0, 0, 3, 0], [0, 2, 4, 1]], dtype=torch.float64)
    torch.testing.assert_close(neuron_lengths(down) * a[0].abs(), torch.tensor([2, 1, 0.5, 0.05], dtype=torch.float64))
    curve = tail_curve(a, down)
    wanted = {0.0: (0.05, 0.0), 0.03: (0.5, 0.25), 0.26: (1.0, 0.5), 0.4: (2.0, 0.75)}
    for target, (threshold, sparsity) in wanted.items():
        assert curve.at(target) == (pytest.approx(threshold), sparsity)
    golden = [0.02747211, 0.25328037, 0.39334080]
    assert [dense(a, down, threshold)[0] for threshold in (0.06, 0.6, 1.1)] == pytest.approx(golden, abs=5e-9)  # 8 decimals are given
    assert curve.cett.tolist() == pytest.approx([0, *golden, 1], abs=3e-8)  # kept in fp32


@pytest.mark.parametrize("chunk", [1, 10**6])
@pytest.mark.parametrize("block", [4, 5, 32])  # three blocks, a part of one among three, and a part of a single one
def test_every_point_of_the_curve_is_the_definition(monkeypatch: pytest.MonkeyPatch, chunk: int, block: int) -> None:
    monkeypatch.setattr(cett, "CHUNK_ELEMENTS", {"cpu": chunk})
    monkeypatch.setattr(cett, "BLOCK", block)
    activations, down = random(5, 12, 4)
    activations[:, 3:5] = 0.0  # as ReLU leaves them
    activations[2] = 0.0  # a token without output
    curve = tail_curve(activations, down)
    assert len(curve.thresholds) == 4 * 10 + 1 + 1, "one for each non-zero neuron, one below that keeps all, one above all"
    highest = 0.0
    for threshold, sparsity, error in zip(*(column.tolist() for column in curve), strict=True):
        wanted, share = dense(activations, down, threshold)
        highest = max(highest, wanted)
        assert sparsity == pytest.approx(share, rel=1e-6) and error == pytest.approx(highest, rel=1e-6, abs=1e-12)  # kept in fp32
    assert curve.cett[-1] == 1 and curve.sparsity[-1] == 1


@pytest.mark.parametrize("target", [0.0, 0.01, 0.2, 0.5, 0.999, 1.0])
def test_the_threshold_found_is_the_largest_that_keeps_to_the_target(target: float) -> None:
    activations, down = random(6, 20, 8, seed=3)
    curve = tail_curve(activations, down)
    threshold, sparsity = curve.at(target)
    reached, share = dense(activations, down, threshold)
    assert reached <= target and sparsity == pytest.approx(share)
    if target < 1:
        larger = curve.thresholds[curve.thresholds > threshold][0].item()
        assert dense(activations, down, larger)[0] > target


def test_a_target_below_the_first_step_keeps_every_neuron() -> None:
    """Where the released search steps one to the left of index 0 and takes the largest threshold of all."""
    activations, down = random(3, 8, 4)
    threshold, sparsity = tail_curve(activations, down).at(1e-12)
    assert sparsity == 0.0 and dense(activations, down, threshold) == (0.0, 0.0)


def test_neurons_that_cancel_do_not_hide_what_comes_before() -> None:
    """Two opposite neurons: with the first alone left out the error is large, with both it is 0 again. No target below accepts both."""
    a, down = torch.tensor([[1.0, 1.001, 2.0]]), torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]])
    curve = tail_curve(a, down)
    assert curve.at(0.3) == (pytest.approx(1.0), 0.0) and curve.at(0.5)[1] == pytest.approx(2 / 3)


def test_equal_neurons_go_together_and_zeros_go_for_nothing() -> None:
    a, down = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 3.0]]), torch.eye(6)
    curve = tail_curve(a, down)
    assert curve.thresholds[:3].tolist() == [0.0, 1.0, 3.0] and curve.sparsity[:3].tolist() == pytest.approx([0, 3 / 6, 5 / 6])
    assert curve.at(0.0) == (1.0, 0.5)


def test_a_layer_of_nothing_has_no_error() -> None:
    curve = tail_curve(torch.zeros(4, 3), torch.ones(2, 3))
    assert curve.cett.tolist() == [0.0, 0.0] and curve.at(0.0)[1] == 1.0


@pytest.mark.parametrize("edge", [0.0, 0.123, 0.5, 0.99999, 1.0])
@pytest.mark.parametrize("tried", [(), (0.1, 0.3, 0.9)])
def test_bisection_comes_from_below_and_asks_no_number_twice(edge: float, tried: tuple[float, ...]) -> None:
    asked: list[float] = []

    def holds(value: float) -> bool:
        asked.append(value)
        return value <= edge

    found = largest_within(holds, tried, 1e-4)
    assert edge - 1e-4 <= found <= edge and len(set(asked)) == len(asked) <= 18
    assert edge < 1 or found == 1.0
    for count, value in enumerate(asked):
        held, failed = ([each for each in asked[:count] if (each <= edge) is side] for side in (True, False))
        assert max(held, default=0) < value < min(failed, default=1.1), "what is known already is not asked"
