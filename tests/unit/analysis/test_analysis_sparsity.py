"""Neurons left out of whole models, against MLPs written out neuron by neuron; what is counted; where PPL-p% ends."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megastab.analysis.command_line import parser_of
from megastab.analysis.hugging_face import subject_of as foreign_subject
from megastab.analysis.own_model import subject_of as own_subject
from megastab.analysis.perplexity import perplexity
from megastab.analysis.probe_arguments import Windows
from megastab.analysis.pruned import activations, down_projections, pruned
from megastab.analysis.sparsity import TARGETS, Probe
from megastab.analysis.subject import Subject
from megastab.config.errors import UserError
from tests.unit.analysis.models import foreign_model, save_own
from tests.unit.model_generate.tiny import tiny_model

KINDS = ("ours llama", "ours gpt", "gpt2", "llama")
TOKENS = torch.arange(28).view(2, 14) + 3
DRAW = torch.Generator().manual_seed(5)
WINDOWS = Windows(torch.randint(3, 90, (6, 16), generator=DRAW), torch.randint(3, 90, (5, 12), generator=DRAW))


def subject(kind: str, **changes: object) -> Subject:
    if kind.startswith("ours"):
        return own_subject(tiny_model(kind.split()[1], **changes), kind)
    model = foreign_model(kind, **changes)
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)
    return foreign_subject(model, kind)


def neurons(kind: str, mlp: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
    """(activations, down projection as [out, in], its bias) of an MLP, by its formula."""
    match kind:
        case "ours llama":
            gate, up = (x @ mlp.up.weight.t()).split(64, -1)
            return F.silu(gate) * up, mlp.down.weight.t(), 0.0
        case "ours gpt":
            return F.gelu(x @ mlp.up.weight.t() + mlp.up.bias, approximate="tanh"), mlp.down.weight.t(), mlp.down.bias
        case "gpt2":
            hidden = F.gelu(x @ mlp.c_fc.weight + mlp.c_fc.bias, approximate="tanh")
            return hidden, mlp.c_proj.weight.t(), mlp.c_proj.bias
        case _:
            return F.silu(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight, 0.0


def written_out(kind: str, mlp: nn.Module, threshold: float, counts: list[int]) -> Callable[..., Tensor]:
    """An MLP that adds up the neurons whose output is at least ``threshold`` long; counts those left out."""

    def forward(x: Tensor, *_: object) -> Tensor:
        hidden, down_DF, bias = neurons(kind, mlp, x)
        terms = hidden[..., None, :] * down_DF  # [..., D, F]
        is_kept = terms.square().sum(-2).sqrt() >= threshold
        counts[0] += int((~is_kept).sum())
        return (terms * is_kept[..., None, :]).sum(-1) + bias

    return forward


@pytest.mark.parametrize("kind", KINDS)
def test_left_out_neurons_are_those_of_short_output(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = subject(kind)
    downs, thresholds = down_projections(asked), [0.1 + 0.2 * i for i in range(len(asked.blocks))]
    plain = asked.logits(TOKENS)
    with pruned(downs, thresholds) as counts:
        found = asked.logits(TOKENS)
        counted = counts()
    assert torch.equal(asked.logits(TOKENS), plain), "the hooks are off again"
    expected_counts = [[0] for _ in downs]
    for i, mlp in enumerate(asked.mlps):
        monkeypatch.setattr(mlp, "forward", written_out(kind, mlp, thresholds[i], expected_counts[i]))
    # fp32: sums in another order. A neuron on the other side of a threshold would move logits by 1e-3.
    torch.testing.assert_close(found, asked.logits(TOKENS), rtol=1e-4, atol=1e-4)
    assert [c.left_out for c in counted] == [c for (c,) in expected_counts]
    width = {"gpt2": 128}.get(kind, 64)
    assert all(c.neurons == c.nonzero == 28 * width and 0 < c.left_out < c.neurons for c in counted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_activations_are_what_enters_the_down_projection(kind: str, batch: int) -> None:
    asked, inputs = subject(kind), []
    spies = [mlp.register_forward_pre_hook(lambda _m, given: inputs.append(given[0])) for mlp in asked.mlps]
    asked.logits(WINDOWS.calibration_CS)
    for spy in spies:
        spy.remove()
    found = activations(asked, down_projections(asked), WINDOWS.calibration_CS, batch, 10**6)
    few = activations(asked, down_projections(asked), WINDOWS.calibration_CS, batch, 7)
    kept = [0, 10, 20, 30, 39, 49, 59]  # of 60 tokens, 59/6 apart: 29.5 goes to the even 30
    for mlp, x, all_NF, few_NF in zip(asked.mlps, inputs, found, few, strict=True):
        expected = neurons(kind, mlp, x.reshape(60, -1))[0]
        torch.testing.assert_close(all_NF, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(few_NF, expected[kept], rtol=1e-4, atol=1e-5)


def dense_cett(hidden: Tensor, down_DF: Tensor, threshold: float) -> float:
    terms = hidden.double()[:, None, :] * down_DF.double()
    is_out = (hidden.float().abs() * down_DF.float().norm(dim=0) < threshold)[:, None, :]
    return float(((terms * is_out).sum(-1).norm(dim=-1) / terms.sum(-1).norm(dim=-1)).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_attains_the_same_cett_on_the_calibration(kind: str) -> None:
    asked = subject(kind)
    probe = Probe(asked, WINDOWS, batch=2)
    seen = activations(asked, probe.downs, WINDOWS.calibration_CS, 1, 60)
    for cett in (0.05, 0.3):
        for mlp, hidden, threshold in zip(asked.mlps, seen, probe.at(cett).thresholds, strict=True):
            down_DF = neurons(kind, mlp, torch.zeros(1, 32))[1]
            reached = dense_cett(hidden, down_DF, threshold)
            # 60 tokens of 64 neurons or more: a step is 1e-3 at most; activations of other batch sizes differ in their last bits
            assert cett - 2e-3 < reached <= cett + 1e-4


def test_a_point_is_the_pruned_models_perplexity_and_sparsity() -> None:
    asked = subject("ours llama")
    probe = Probe(asked, WINDOWS, batch=4)
    point = probe.at(0.2)
    with pruned(probe.downs, point.thresholds) as counts:
        found = perplexity(asked, WINDOWS.evaluated_NS, 4)
        by_layer = counts()
    assert (point.perplexity, point.counts) == (found, by_layer) and found != probe.plain
    assert point.sparsity == pytest.approx(sum(c.left_out for c in by_layer) / (6 * 16 * 64 * 2))
    assert point.sparsities() == [c.left_out / (6 * 16 * 64) for c in by_layer] and point.sparsities()[0] != point.sparsities()[1]


@pytest.mark.parametrize("percent", [0.5, 5.0])
def test_ppl_percent_is_the_last_cett_within_the_bound(percent: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a perplexity made to grow with CETT as 1 + CETT^2."""
    probe = Probe(subject("ours llama"), WINDOWS)
    tried, real = [], probe.at

    def growing(cett: float) -> object:
        tried.append(cett)
        return real(cett)._replace(perplexity=probe.plain * (1 + cett**2))

    monkeypatch.setattr(probe, "at", growing)
    best = probe.within(percent, 1e-4)
    exact = (percent / 100) ** 0.5
    assert exact - 1e-4 <= best.cett <= exact and best.perplexity <= probe.plain * (1 + percent / 100)
    assert best.perplexity > probe.plain * (1 + (exact - 1.1e-4) ** 2) and 0.0 not in tried[:-1]


def test_ppl_percent_on_a_model_keeps_its_bound_and_the_next_point_breaks_it() -> None:
    """On text the model itself finds likeliest, which it knows less well with every neuron it loses."""
    asked, own_NS = subject("ours gpt"), torch.arange(6)[:, None] * 9 + 3
    while own_NS.shape[1] < 16:
        own_NS = torch.cat([own_NS, asked.logits(own_NS)[:, -1:].argmax(-1)], dim=1)
    probe = Probe(asked, WINDOWS._replace(evaluated_NS=own_NS), batch=6)
    best = probe.within(1.0, 1e-3)
    bound = probe.plain * 1.01
    above = min(cett for cett in probe.points if cett > best.cett)
    assert best.perplexity <= bound < probe.points[above].perplexity and above - best.cett <= 1e-3


@pytest.mark.parametrize(("kind", "changes"), [("ours gpt", {"activation": "relu"}), ("gpt2", {"activation_function": "relu"})])
def test_relu_is_counted_as_lazy_and_its_zeros_are_left_out_for_nothing(kind: str, changes: dict[str, object]) -> None:
    asked = subject(kind, **changes)
    probe = Probe(asked, Windows(WINDOWS.calibration_CS, WINDOWS.calibration_CS))  # the same, so that 0 is 0 exactly
    zero = probe.at(0.0)
    hidden = activations(asked, probe.downs, WINDOWS.calibration_CS, 1, 10**6)
    shares = [float((layer != 0).float().mean()) for layer in hidden]
    assert probe.nonzero() == pytest.approx(shares) and all(0.2 < share < 0.8 for share in shares)
    assert zero.sparsities() == pytest.approx([1 - share for share in shares]) and zero.perplexity == probe.plain


def test_blocks_without_one_known_down_projection_are_refused() -> None:
    asked = subject("llama")
    linears = list(asked.linears())
    two = dataclasses.replace(asked, find_linears=lambda: iter([*linears, linears[-1]]))
    none = dataclasses.replace(asked, find_linears=lambda: iter([linear._replace(role="w2") for linear in linears]))
    with pytest.raises(UserError, match="llama has 4 down projections in 3 blocks"):
        down_projections(two)
    with pytest.raises(UserError, match="llama has 0 down projections in 3 blocks.*its first block has w2, w2"):
        down_projections(none)


def run(*arguments: object) -> None:
    asked = parser_of(None).parse_args([str(each) for each in arguments])
    asked.run(asked)


def test_the_command_writes_tables_and_a_picture(tmp_path: Path, text_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megastab.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(text_data / "tok.model")
    model = save_own(tmp_path / "run", tokenizer, vocab_size=512)
    asked = ("sparsity", model, "--text", text_data / "text_valid", "--windows", 4, "--calibration", 2, "--tokens", 40)
    run(*asked, "--percent", 2, "--tolerance", 0.01, "--output", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    assert [point["cett"] for point in found["points"] if point["cett"] in TARGETS] == list(TARGETS)
    best = found["ppl_percent"]
    assert best["percent"] == 2 and best["perplexity"] <= 1.02 * found["perplexity"] and len(found["nonzero"]) == 2
    assert "PPL-2%" in (tmp_path / "out" / "sparsity.md").read_text() and "layers at PPL-2%" in capsys.readouterr().out
    assert (tmp_path / "out" / "sparsity.png").stat().st_size > 5000
    with pytest.raises(UserError, match="--tolerance 0.0 must lie between 0 and 1"):
        run(*asked, "--tolerance", 0)
