"""A model whose matrices and their inputs are rounded while it runs: the fake quantisation of ``quantize.py``.

Each matrix of a block is rounded when its turn comes and put back right after, so that the memory is that of one more matrix and the
model's weights are never written. Embeddings, head, norms and biases stay as they are. The products are taken in the weights' dtype;
fused matrices are rounded as the separate matrices they are, and an output channel is a row or a column as the matrix is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from megastab.analysis.perplexity import batches
from megastab.analysis.rounding import absmax, largest, zeropoint
from megastab.analysis.subject import Linear, Subject

InputScales = Literal["none", "static", "batch", "token"]


class Recipe(NamedTuple):
    """What is rounded to how many bits, and what one scale serves."""

    name: str
    weight_bits: int
    weight_form: Literal["absmax", "zeropoint"]
    weight_scales: Literal["tensor", "channel"]
    input_scales: InputScales = "none"
    """One for a matrix's inputs, fixed by calibration (static) or taken from each batch; one for every token; or inputs not rounded."""
    input_bits: int = 8


class InputRange(NamedTuple):
    """What enters one matrix, over the calibration windows."""

    largest: Tensor
    """max|x|, a scalar on the model's device."""
    rms: float


def rounded_weight(linear: Linear, recipe: Recipe) -> Tensor:
    """A rounded copy of a matrix, its fused parts each by itself."""
    output_dim = 1 if linear.is_transposed else 0
    dims = 1 - output_dim if recipe.weight_scales == "channel" else None
    form = absmax if recipe.weight_form == "absmax" else zeropoint
    parts = [form(part, recipe.weight_bits, dims) for part in linear.weight.detach().split(list(linear.parts), output_dim)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, output_dim)


def rounded_inputs(x: Tensor, recipe: Recipe, calibrated: Tensor | None) -> Tensor:
    """What a matrix sees of its inputs [..., in]."""
    match recipe.input_scales:
        case "none":
            return x
        case "static":
            assert calibrated is not None
            return absmax(x, recipe.input_bits, limit=calibrated)
        case "batch":
            return absmax(x, recipe.input_bits)
        case "token":
            return absmax(x, recipe.input_bits, dims=-1)


def input_ranges(subject: Subject, linears: Sequence[Linear], windows_CS: Tensor, batch: int) -> list[InputRange]:
    """The range of every matrix's inputs."""
    tops: list[Tensor | None] = [None] * len(linears)
    squares, counts = [0.0] * len(linears), [0] * len(linears)

    def see(i: int, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        top, known = largest(inputs[0]).flatten(), tops[i]
        tops[i] = top if known is None else torch.maximum(known, top)
        squares[i] += float(inputs[0].double().square().sum())
        counts[i] += inputs[0].numel()

    with _hooks([(linear.module, partial(see, i), None) for i, linear in enumerate(linears)]):
        for window_BS in batches(windows_CS, batch, "calibration"):
            subject.run(window_BS)
    return [InputRange(top, (s / n) ** 0.5) for top, s, n in zip(tops, squares, counts, strict=True) if top is not None]


@contextmanager
def quantised(linears: Sequence[Linear], recipe: Recipe, ranges: Sequence[InputRange]) -> Iterator[None]:
    """Inside, the matrices and their inputs are rounded by ``recipe``; ``ranges`` from :func:`input_ranges`, of the same matrices."""
    originals = [linear.weight.data for linear in linears]

    def before(i: int, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        linears[i].weight.data = rounded_weight(linears[i], recipe)
        return (rounded_inputs(inputs[0], recipe, ranges[i].largest), *inputs[1:])

    def after(i: int, *_seen: Any) -> None:
        linears[i].weight.data = originals[i]

    try:
        with _hooks([(linear.module, partial(before, i), partial(after, i)) for i, linear in enumerate(linears)]):
            yield
    finally:
        for linear, original in zip(linears, originals, strict=True):
            linear.weight.data = original  # a pass that failed half-way


@contextmanager
def _hooks(wanted: Sequence[tuple[nn.Module, Callable[..., Any], Callable[..., Any] | None]]) -> Iterator[None]:
    """(module, called before, called after) for the time of the context."""
    handles: list[Any] = []
    try:
        for module, before, after in wanted:
            handles.append(module.register_forward_pre_hook(before))
            handles += [module.register_forward_hook(after)] if after else []
        yield
    finally:
        for handle in handles:
            handle.remove()
