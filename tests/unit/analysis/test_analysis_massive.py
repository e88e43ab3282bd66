"""Massive activations on models that have one by construction, and the rule itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megastab.analysis import existence
from megastab.analysis.hugging_face import subject_of
from megastab.analysis.intervene import Replacement, intervene, means_of
from megastab.analysis.own_model import subject_of as own_subject
from megastab.analysis.stream import Layer, StreamWatch, first_massive, look, massive_entries, median_of
from megastab.analysis.subject import Subject
from megastab.config.errors import UserError
from tests.unit.analysis import planted
from tests.unit.analysis.models import foreign_model
from tests.unit.model_generate.tiny import tiny_model


def theirs(first_layer: int = 0) -> Subject:
    model = foreign_model("llama", tie_word_embeddings=False)
    subject = subject_of(model, "theirs")
    return planted.plant(subject, model.model.embed_tokens.weight, model.lm_head.weight, first_layer)  # type: ignore[union-attr, arg-type]


def ours(first_layer: int = 0) -> Subject:
    model = tiny_model(num_layers=3, max_seq_len=48)
    return planted.plant(own_subject(model, "ours"), model.embedding.weight, model.head.weight, first_layer)


@pytest.mark.parametrize("make", [theirs, ours])
@pytest.mark.parametrize("first_layer", [0, 1])
def test_existence_finds_the_planted_entry_and_no_other(make: Callable[[int], Subject], first_layer: int) -> None:
    subject = make(first_layer)
    layers = look(subject, planted.windows(subject.vocab_size, 5, 40, bos=True), batch=2)
    assert first_massive(layers) == first_layer
    for layer in layers[first_layer:]:
        (spot,) = layer.spots
        assert (spot.channel, spot.is_first, spot.token, spot.num_entries) == (planted.CHANNEL, True, planted.BOS, 5)
        assert spot.largest.position == 0 and layer.num_massive_windows == layer.num_windows == 5
        # exact where it is an embedding; where a norm (eps) and an MLP make it, theirs is 3e-5 and ours, with eps 1e-5, 3e-4 short
        assert spot.largest.value == pytest.approx(planted.SIZE, rel=5e-4 if first_layer else 0)
        assert layer.seen.is_massive and layer.seen.largest == spot.largest.value
    assert not any(layer.spots for layer in layers[:first_layer])
    without = look(subject, planted.windows(subject.vocab_size, 5, 40, bos=False))
    assert first_massive(without) is None and not any(layer.seen.is_massive for layer in without)
    said = existence.verdict(subject, layers)
    assert said["massive activations"] and said["layers"] == f"{first_layer}-2" and said["channels"] == "13"
    assert said["at the first position"] == "<1>" and said["at later positions"] is None and said["windows"] == "5 of 5"


@pytest.mark.parametrize("make", [theirs, ours])
@pytest.mark.parametrize("first_layer", [0, 1])
def test_zero_makes_the_planted_model_collapse_and_the_mean_does_not(make: Callable[[int], Subject], first_layer: int) -> None:
    subject = make(first_layer)
    trial = intervene(subject, planted.windows(subject.vocab_size, 6, 40, bos=True), 2, 2, "test")
    assert trial.layer == first_layer and list(trial.means) == [(planted.CHANNEL, True)]
    zero, mean = trial.effects
    assert (zero.which, zero.value, zero.num_entries) == ("first tokens", "zero", 4) and mean.value == "mean" and mean.num_entries == 4
    assert trial.before < 1.2 and zero.perplexity > 1e4
    assert mean.perplexity == pytest.approx(trial.before, rel=1e-6)  # the mean of equal fp32 values differs from them by rounding at most
    without = intervene(subject, planted.windows(subject.vocab_size, 6, 40, bos=False), 2, 2, "test")
    assert without.layer is None and without.effects == []


def test_the_order_of_windows_and_the_batch_do_not_matter() -> None:
    subject, windows = theirs(), torch.randint(3, 90, (5, 12), generator=torch.Generator().manual_seed(0))
    one, three = look(subject, windows, 1), look(subject, windows, 3)
    for a, b in zip(one, three, strict=True):
        assert a.seen.median == b.seen.median and a.seen.largest == pytest.approx(b.seen.largest, rel=1e-6)  # gemm of another shape
        assert a.mean_top == pytest.approx(b.mean_top, rel=1e-6) and a.num_windows == b.num_windows == 5


def test_curves_are_means_over_windows_of_each_ones_largest() -> None:
    watch = StreamWatch(1)
    watch.window_BS = torch.tensor([[7, 8], [9, 7]])
    watch.see(0, torch.tensor([[[1.0, -4.0], [3.0, 0.5]], [[2.0, 1.0], [-8.0, 6.0]]]))
    (layer,) = watch.layers()
    assert layer.mean_top == (6.0, 4.5, 1.5)
    assert [(e.value, e.sample, e.position, e.channel, e.token) for e in layer.seen.top] == [
        (-8.0, 1, 1, 0, 7),  # 3.0 stands at the same position and channel of window 0 and is not told again
        (6.0, 1, 1, 1, 7),
        (-4.0, 0, 0, 1, 7),
    ]
    assert layer.mean_median == pytest.approx((1.0 + 2.0) / 2, rel=0.005)  # lower middle values, from a histogram (MEDIAN_ERROR)


def test_the_rule_of_the_papers() -> None:  # ALGORITHMS 13.6
    def found(*values: float, median: float) -> list[float]:
        return [value for value, _, _ in massive_entries(torch.tensor([values]), median)]

    assert found(0.1, 0.2, -0.3, 150, 0.05, 0.1, median=0.1) == [150.0]
    assert found(*[0.2] * 9, 199.9, median=0.2) == [] and found(*[0.2] * 9, 200.0, median=0.2) == [200.0]
    assert found(*[0.05] * 9, 99, median=0.05) == [] and found(*[0.05] * 9, -100.5, median=0.05) == [-100.5]
    assert found(0.0, 0.0, 0.0, 5000.0, median=0.0) == [], "padding and ReLU make a median of 0, which decides nothing"


def test_channels_are_the_union_over_windows() -> None:
    hidden = torch.full((3, 4, 8), 0.1)
    hidden[0, 0, 2], hidden[1, 0, 5], hidden[2, 3, 5] = 900.0, -700.0, 300.0
    watch = StreamWatch(1)
    watch.window_BS = torch.full((3, 4), 4)
    watch.see(0, hidden)
    (layer,) = watch.layers()
    assert means_of(layer) == pytest.approx({(2, True): 900.0, (5, True): -700.0, (5, False): 300.0})  # fp32 values
    assert layer.num_massive_windows == 3


def stand_in(hidden: Tensor, which: str, value: str) -> tuple[Tensor | None, int]:
    means = {(2, True): 500.0, (5, False): -250.0}
    replacement = Replacement(means, which, value)  # type: ignore[arg-type]
    return replacement.see(0, hidden), replacement.num_entries


@pytest.mark.parametrize(
    ("which", "value", "first", "other", "count"),
    [
        ("first tokens", "zero", 0.0, -300.0, 2),
        ("first tokens", "mean", 500.0, -300.0, 2),
        ("other tokens", "zero", 600.0, 0.0, 1),
        ("other tokens", "mean", 600.0, -250.0, 1),
        ("all", "mean", 500.0, -250.0, 3),
    ],
)
def test_first_tokens_and_others_are_replaced_apart(which: str, value: str, first: float, other: float, count: int) -> None:
    hidden = torch.full((2, 4, 8), 0.1)
    hidden[:, 0, 2], hidden[1, 3, 5] = 600.0, -300.0
    hidden[0, 2, 7] = 400.0  # massive, but no calibration window knew its channel
    hidden[0, 1, 2] = 90.0  # a known channel, but not massive
    new, replaced = stand_in(hidden, which, value)
    assert new is not None and replaced == count
    expected = hidden.clone()
    expected[:, 0, 2], expected[1, 3, 5] = first, other
    torch.testing.assert_close(new, expected, rtol=0, atol=0)
    assert hidden[0, 0, 2] == 600.0, "what the block gave is not written to"


def test_nothing_to_replace_leaves_the_block_alone() -> None:
    assert stand_in(torch.full((2, 4, 8), 0.1), "all", "zero") == (None, 0)


def test_fp16_overflow_names_the_layer() -> None:
    model = foreign_model("llama", tie_word_embeddings=False)
    subject = planted.plant(subject_of(model, "tall"), model.model.embed_tokens.weight, model.lm_head.weight, 1)  # type: ignore[union-attr, arg-type]
    model.model.layers[1].mlp.down_proj.weight.data.mul_(20)  # type: ignore[union-attr, index]  # 100,000
    windows = planted.windows(subject.vocab_size, 2, 20, bos=True)
    assert look(subject, windows)[1].seen.largest == pytest.approx(100_000, rel=1e-3)
    model.half()
    with pytest.raises(UserError, match=r"tall: 2 values behind layer 1 are not finite in float16: use --dtype fp32"):
        look(subject, windows)
    model.float()
    model.model.embed_tokens.weight.data[planted.BOS] = math.nan  # type: ignore[union-attr, index, operator]
    with pytest.raises(UserError, match=r"behind layer 0 are not finite in float32: its weights or its input are broken"):
        look(subject, windows)


def test_calibration_must_leave_windows_to_measure() -> None:
    subject = theirs()
    with pytest.raises(UserError, match="--calibration 4 of 4 windows"):
        intervene(subject, planted.windows(subject.vocab_size, 4, 20, bos=True), 4, 1, "test")


def test_a_list_the_model_does_not_run_is_told() -> None:
    with pytest.raises(UserError, match="a block was never called"):
        StreamWatch(2).layers()


def test_runs_of_layers_read_as_a_person_writes_them() -> None:
    assert existence.runs([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10"


def test_medians_are_a_windows_own() -> None:
    assert median_of(torch.tensor([[1.0, -2.0], [8.0, 4.0]])) == pytest.approx(2.0, rel=0.005)
    assert isinstance(look(theirs(), planted.windows(96, 1, 4, bos=True))[0], Layer)
