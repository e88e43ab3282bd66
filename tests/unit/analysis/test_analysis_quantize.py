"""Fake quantisation of whole models against copies whose matrices are rounded channel by channel; nothing is left behind."""

from __future__ import annotations

import copy
import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megastab.analysis import quantised as module
from megastab.analysis.command_line import parser_of
from megastab.analysis.hugging_face import subject_of as foreign_subject
from megastab.analysis.own_model import subject_of as own_subject
from megastab.analysis.perplexity import perplexity
from megastab.analysis.probe_arguments import Windows
from megastab.analysis.quantised import Recipe, input_ranges, quantised
from megastab.analysis.quantize import RECIPES, Findings, Penalty, figure_of, not_rounded, probe
from megastab.analysis.subject import Subject
from megastab.config.errors import UserError
from tests.unit.analysis.models import FAMILIES, foreign_model, save_foreign
from tests.unit.model_generate.tiny import tiny_model

TOKENS, OTHERS = torch.arange(28).view(2, 14) + 3, torch.arange(40, 61).view(3, 7)
PLAIN, FUSED = {"q": (32,), "k": (16,), "v": (16,), "o": (32,), "gate": (64,), "up": (64,), "down": (32,)}, (32, 32, 32)
PARTS: dict[str, dict[str, tuple[int, ...]]] = {
    "ours llama": {"attention.qkv": (32, 16, 16), "attention.o": (32,), "mlp.up": (64, 64), "mlp.down": (32,)},
    "ours gpt": {"attention.qkv": FUSED, "attention.o": (32,), "mlp.up": (64,), "mlp.down": (32,)},
    "gpt2": {"attn.c_attn": FUSED, "attn.c_proj": (32,), "mlp.c_fc": (128,), "mlp.c_proj": (32,)},
    "llama": {f"{'self_attn' if name in 'qkvo' else 'mlp'}.{name}_proj": sizes for name, sizes in PLAIN.items()},
}
TRANSPOSED = {"ours llama": ("attention.o", "mlp.down"), "ours gpt": ("attention.o", "mlp.down"), "gpt2": tuple(PARTS["gpt2"]), "llama": ()}


def subject(kind: str, dtype: torch.dtype = torch.float64) -> Subject:
    """In fp64, where a code is next to never decided by rounding of the products before it."""
    if kind.startswith("ours"):
        return own_subject(tiny_model(kind.split()[1], norm="layernorm").to(dtype), kind)  # our RMSNorm has no fp64
    model = foreign_model(kind).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)  # wide enough for every matrix to matter
    return foreign_subject(model, kind)


def matrices(kind: str, model: nn.Module) -> list[tuple[nn.Module, tuple[int, ...], bool]]:
    """(module, sizes of its parts, stored [in, out]) of every block, from the tables above."""
    named, blocks = dict(model.named_modules()), {"gpt2": "transformer.h", "llama": "model.layers"}.get(kind, "blocks")
    depth = 3 if kind in ("gpt2", "llama") else 2
    return [(named[f"{blocks}.{i}.{name}"], sizes, name in TRANSPOSED[kind]) for i in range(depth) for name, sizes in PARTS[kind].items()]


def nearest(x: Tensor, low: float, high: float, steps: int) -> Tensor:
    """The definition, on one slice: the nearest of the values ``steps`` apart from low to high, 0 among them."""
    scale = (high - low) / steps
    values = (torch.arange(steps + 1, dtype=torch.float64) + torch.round(torch.tensor(low / scale, dtype=torch.float64))) * scale
    return values[(x.flatten()[:, None] - values).abs().argmin(1)].view_as(x)


def round_slice(x: Tensor, recipe: Recipe) -> Tensor:
    if recipe.weight_form == "absmax":
        return nearest(x, -float(x.abs().max()), float(x.abs().max()), 2**recipe.weight_bits - 2)
    return nearest(x, min(0.0, float(x.min())), max(0.0, float(x.max())), 2**recipe.weight_bits - 1)


def rounded_copy(kind: str, model: nn.Module, recipe: Recipe, calibration: Tensor) -> Callable[[Tensor], Tensor]:
    """The logits of a deep copy that is rounded for good, its inputs by hooks of its own."""
    tops: list[float] = []
    spies = [m.register_forward_pre_hook(lambda _m, i: tops.append(float(i[0].abs().max()))) for m, _, _ in matrices(kind, model)]
    own = kind.startswith("ours")
    forward = (lambda m, x: m.logits(x).view(*x.shape, -1)[..., :400]) if own else (lambda m, x: m(input_ids=x).logits)
    with torch.no_grad():
        forward(model, calibration)
    for spy in spies:
        spy.remove()
    result = copy.deepcopy(model)
    for (layer, sizes, is_transposed), top in zip(matrices(kind, result), tops, strict=True):
        weight = layer.weight.data.t() if is_transposed else layer.weight.data
        parts = [row for part in weight.split(sizes) for row in (part.unbind() if recipe.weight_scales == "channel" else [part])]
        dense = torch.cat([round_slice(part, recipe).reshape(-1, weight.shape[1]) for part in parts])
        layer.weight.data = (dense.t() if is_transposed else dense).contiguous()
        layer.register_forward_pre_hook(lambda _m, inputs, top=top: (round_input(inputs[0], recipe, top),))
    return lambda tokens: forward(result, tokens)


def round_input(x: Tensor, recipe: Recipe, top: float) -> Tensor:
    match recipe.input_scales:
        case "none":
            return x
        case "token":
            return torch.stack([round_input(row, recipe._replace(input_scales="batch"), top) for row in x.flatten(0, -2)]).view_as(x)
        case "batch":
            top = float(x.abs().max())
    return nearest(x.clamp(-top, top), -top, top, 2**recipe.input_bits - 2)


@pytest.mark.parametrize("kind", list(PARTS))
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_recipe_is_a_copy_rounded_by_the_definition(kind: str, recipe: Recipe) -> None:
    asked = subject(kind)
    linears = list(asked.linears())
    with torch.no_grad():
        expected = rounded_copy(kind, asked.model, recipe, OTHERS)(TOKENS)
        before = asked.logits(TOKENS)
    ranges = input_ranges(asked, linears, OTHERS, batch=3)
    with quantised(linears, recipe, ranges):
        found = asked.logits(TOKENS)
    # both sides round to the same codes; what is left is the order of sums. One code missed moves logits by 1e-3 and more.
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    assert (found - before).abs().max() > 1e-3, "rounding was seen at all"


def test_the_model_is_what_it_was_also_after_a_pass_that_failed() -> None:
    asked = subject("gpt2", torch.float32)
    linears = list(asked.linears())
    weights = [(linear.weight.data_ptr(), linear.weight.detach().clone()) for linear in linears]
    before, ranges = asked.logits(TOKENS), input_ranges(asked, linears, OTHERS, 1)
    with quantised(linears, RECIPES[0], ranges):
        asked.logits(TOKENS)
        assert all(torch.equal(linear.weight, old) for linear, (_, old) in zip(linears, weights, strict=True)), "between passes"
    broken = linears[5].module.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), quantised(linears, RECIPES[0], ranges):
        linears[5].module._forward_pre_hooks.move_to_end(broken.id)  # behind ours: the matrix is rounded when it fails
        asked.logits(TOKENS)
    broken.remove()
    assert all(
        linear.weight.data_ptr() == at and torch.equal(linear.weight, old) for linear, (at, old) in zip(linears, weights, strict=True)
    )
    assert torch.equal(asked.logits(TOKENS), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in asked.model.modules())


def test_one_rounded_matrix_lives_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = subject("ours llama", torch.float32)
    linears, made, alive = list(asked.linears()), [], []
    ranges, original = input_ranges(asked, linears, OTHERS, 1), module.rounded_weight

    def watched(*arguments: Any) -> Tensor:
        alive.append(sum(reference() is not None for reference in made))
        result = original(*arguments)
        made.append(weakref.ref(result.untyped_storage()))
        return result

    monkeypatch.setattr(module, "rounded_weight", watched)
    with quantised(linears, RECIPES[-1], ranges):
        asked.logits(TOKENS)
    assert alive == [0] * 8


def test_static_scales_are_of_the_calibration_and_cut_what_exceeds_it() -> None:
    """With calibration inputs a tenth as large as those met, static scales do far worse than scales taken from each batch."""
    asked = subject("ours llama", torch.float32)
    linears = list(asked.linears())
    ranges = input_ranges(asked, linears, OTHERS, 1)
    joined = input_ranges(asked, linears, OTHERS, 3)
    for one, all_at_once in zip(ranges, joined, strict=True):
        assert float(one.largest) == pytest.approx(float(all_at_once.largest), rel=1e-5)  # products of other shapes round otherwise
        assert one.rms == pytest.approx(all_at_once.rms, rel=1e-5) and 0 < one.rms < float(one.largest)
    plain = asked.logits(TOKENS)
    errors = {}
    for name, shrunk in (("right", ranges), ("narrow", [each._replace(largest=each.largest / 10) for each in ranges])):
        for recipe in (RECIPES[0], RECIPES[3]):
            with quantised(linears, recipe, shrunk):
                errors[name, recipe.input_scales] = float((asked.logits(TOKENS) - plain).norm())
    assert errors["narrow", "batch"] == errors["right", "batch"] and errors["narrow", "static"] > 5 * errors["right", "static"]


def test_an_outlier_token_costs_the_others_their_codes_unless_every_token_has_its_scale() -> None:
    """The first token's inputs of one matrix are 300 times the others': a scale for all leaves the others 127/300 of a code."""
    asked = subject("ours llama", torch.float32)
    first = asked.model.blocks[1].mlp_norm
    first.register_forward_hook(lambda _m, _i, out: out * torch.where(torch.arange(len(out)) % 14 == 0, 300.0, 1.0)[:, None])
    linears = list(asked.linears())
    ranges, plain = input_ranges(asked, linears, TOKENS, 1), asked.logits(TOKENS)
    assert max(range(8), key=lambda i: float(ranges[i].largest)) in (6, 7), "gate+up and what it makes of it"
    errors = {}
    for recipe in RECIPES[:3]:
        with quantised(linears, recipe, ranges):
            errors[recipe.name] = float((asked.logits(TOKENS) - plain)[:, 1:].norm() / plain[:, 1:].norm())
    assert min(errors["W8A8 coarse"], errors["W8A8 moderate"]) > 10 * errors["W8A8 fine"] > 0


@pytest.mark.parametrize("kind", [*FAMILIES, "ours llama", "ours gpt"])
def test_every_matrix_of_a_dense_block_is_rounded(kind: str) -> None:
    assert not_rounded(subject(kind, torch.float32)) == []


def test_stacked_experts_are_named_as_not_rounded() -> None:
    block = nn.Module()
    block.router, block.experts = nn.Linear(4, 2), nn.Parameter(torch.zeros(2, 4, 4))
    asked = subject("llama", torch.float32)
    asked.blocks[1].add_module("mixture", block)
    assert not_rounded(asked) == ["1.mixture.experts"]


def test_penalties_are_differences_of_perplexity_on_the_evaluated_windows() -> None:
    asked = subject("llama", torch.float32)
    windows = Windows(TOKENS, OTHERS)
    found = probe(asked, windows, recipes=RECIPES[4:])
    assert found.perplexity == perplexity(asked, TOKENS) and [each.recipe for each in found.penalties] == list(RECIPES[4:])
    linears = list(asked.linears())
    ranges = input_ranges(asked, linears, OTHERS, 1)
    assert found.ranges == list(zip(linears, ranges, strict=True)), "scales are of the other windows"
    with quantised(linears, RECIPES[5], ranges):
        four = perplexity(asked, TOKENS)
    assert found.penalties[1] == Penalty(RECIPES[5], four, four - found.perplexity) and four != found.perplexity


def test_a_model_without_a_perplexity_is_refused() -> None:
    asked = subject("llama", torch.float32)
    with torch.no_grad():
        asked.model.lm_head.weight[5] = float("nan")
    with pytest.raises(UserError, match="llama has perplexity nan on this text"):
        probe(asked, Windows(TOKENS, OTHERS))


def test_a_picture_of_penalties_that_lie_far_apart_or_are_infinite() -> None:
    found = Findings(
        9.0, [Penalty(r, 9.0 + p, p) for r, p in zip(RECIPES, (0.002, -0.1, 5000.0, math.inf, math.nan, 0.0), strict=True)], []
    )
    axes = figure_of("m", found).axes[0]
    assert axes.get_xscale() == "symlog" and [text.get_text() for text in axes.texts] == ["0.002", "-0.1", "5000", "inf", "-", "0"]
    near = found._replace(penalties=[each._replace(penalty=1.0) for each in found.penalties])
    assert figure_of("m", near).axes[0].get_xscale() == "linear"


def run(*arguments: object) -> None:
    asked = parser_of(None).parse_args([str(each) for each in arguments])
    asked.run(asked)


def test_the_command_writes_tables_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text = save_foreign(tmp_path / "model", "gpt2"), tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    run("quantize", model, "--text", text, "--windows", 3, "--calibration", 2, "--seq-len", 20, "--output", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "quantize.json").read_text())
    assert (found["windows"], found["calibration_windows"], found["seq_len"], found["bos"]) == (3, 2, 20, True)
    assert [each["name"] for each in found["recipes"]] == [recipe.name for recipe in RECIPES]
    assert all(each["penalty"] == pytest.approx(each["perplexity"] - found["perplexity"]) for each in found["recipes"])
    assert len(found["inputs"]) == 12 and "| W8A8 coarse " in (tmp_path / "out" / "quantize.md").read_text()
    assert (tmp_path / "out" / "quantize.png").stat().st_size > 5000 and "W4 zero-point" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "value"), [("--calibration", 0), ("--windows", 0), ("--batch", 0)])
def test_bad_arguments_are_named(tmp_path: Path, option: str, value: int) -> None:
    model, text = save_foreign(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("words " * 100)
    with pytest.raises(UserError, match=f"{option} {value}.*must be at least 1"):
        run("quantize", model, "--text", text, "--seq-len", 20, option, value)
