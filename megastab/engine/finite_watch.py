"""Hooks that note the first tensor of a step that is not finite, in the order in which one value spoils the next.

Forward comes before backward, a lower micro-batch before a higher one; within these, forward goes from the first pipeline stage to the
last and backward from the last to the first. A weight that is not finite comes before everything computed with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megastab.model.block import Block
from megastab.model.embedding import Head
from megastab.model.stages import Layer
from megastab.parallel import collectives
from megastab.parallel.param_info import info_of
from megastab.wrappers.adapter import Adapter, split_parts

What = Literal["weight", "master weight", "input", "output", "gradient of output", "gradient"]
WEIGHTS, FORWARD, BACKWARD = range(3)


@dataclass(frozen=True, order=True)
class Sighting:
    """A tensor that is not finite; sightings order as the step computes."""

    place: tuple[int, int, int, int]
    """Phase, micro-batch, stage in the phase's direction, number of the check: alike on ranks that run the same code."""
    rank: int
    stage: int
    what: What
    name: str
    module: str
    """Class of the module."""
    num_nonfinite: int
    num_nan: int
    num_elements: int

    @property
    def micro_batch(self) -> int | None:
        """Which forward pass of the step; None for a weight."""
        return None if self.place[0] == WEIGHTS else self.place[1]


def canonical_names(root: nn.Module, adapter: Adapter) -> dict[nn.Module, str]:
    """Every module's name: its path in a plain model, with global layer numbers and without the pipeline's wrapping."""
    anchors: dict[str, str] = {}
    names: dict[nn.Module, str] = {}
    for path, module in root.named_modules():
        if anchor := _anchor(module, adapter):
            anchors[path] = anchor
        above = next((above for above in _upwards(path) if above in anchors), None)
        names[module] = path or "model"
        if above is not None:
            names[module] = anchors[above] + path[len(above) :]
    return names


def _upwards(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def _anchor(module: nn.Module, adapter: Adapter) -> str | None:
    """What a module of ours is called wherever it stands; None for one that is called by its path below such a module."""
    if isinstance(module, Block):
        return f"layers.{adapter.info(next(module.parameters())).layer}"
    if isinstance(module, Head):
        return "head"  # also where its weight is the embedding's
    own = next(module.parameters(recurse=False), None)
    info = info_of(own) if own is not None else None
    return info.parts[0].name if info is not None and info.layer is None else None


class Watch:
    """While entered, looks at every module's inputs and outputs and at every gradient, on this rank; ``first`` is what it found.

    Forward runs again where activations are recomputed: what that computes is not looked at a second time, but its gradients are, since
    with reentrant recompute they are the ones that flow.
    """

    def __init__(self, adapter: Adapter, stage: int):
        self.adapter, self.stage, self.rank = adapter, stage, collectives.world()[0]
        self.root: nn.Module = adapter.engine.module
        self.first: Sighting | None = None
        self._names = canonical_names(self.root, adapter)
        self._owners = {id(p): m for m in reversed(list(self.root.modules())) for p in m.parameters(recurse=False)}  # the first one
        self._undo: list[Callable[[], None]] = []
        self._phase, self._micro_batch, self._num_forwards, self._num_checks = WEIGHTS, 0, 0, 0

    # -- weights, before the step --------------------------------------------------------------------------------------

    def look_at_weights(self) -> None:
        """Whole local parameters, and the fragments this rank owns (all that there is of partitioned ones)."""
        order = {id(p): i for i, p in enumerate(self.root.parameters())}
        for parameter in self.root.parameters():
            flat = parameter.data.reshape(-1)
            for fragment in split_parts(parameter, self.adapter.info(parameter), 0, flat, flat):
                self._look_at_weight("weight", fragment.part.name, parameter, 2 * order[id(parameter)], fragment.low)
        for fragment in self.adapter.fragments():
            name, number = fragment.part.name, 2 * order[id(fragment.parameter)]
            self._look_at_weight("weight", name, fragment.parameter, number, fragment.low)
            self._look_at_weight("master weight", name, fragment.parameter, number + 1, fragment.master)

    def _look_at_weight(self, what: What, name: str, parameter: nn.Parameter, number: int, values: Tensor) -> None:
        owner = self._owners[id(parameter)]
        self._look((WEIGHTS, 0, self.stage, number), what, name, type(owner).__name__, [values])

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Watch:
        try:
            self._install()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._remove()

    def _install(self) -> None:
        root = self.root
        self._keep(root.register_forward_pre_hook(self._begin_forward, prepend=True))
        for module in root.modules():
            if not isinstance(module, Layer):  # the pipeline's wrapping adds nothing to what is inside
                self._keep(module.register_forward_pre_hook(self._inputs, with_kwargs=True))
                self._keep(module.register_forward_hook(self._output))
        for parameter in root.parameters():
            if parameter.requires_grad:
                self._keep(parameter.register_hook(partial(self._gradient, parameter)))
        loss = getattr(root, "loss_fn", None)  # a pipeline's, called outside every module
        if loss is not None and not isinstance(loss, nn.Module):
            root.loss_fn = partial(self._loss, loss)  # type: ignore[assignment]
            self._undo.append(partial(setattr, root, "loss_fn", loss))

    def _remove(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _keep(self, handle: Any) -> None:
        self._undo.append(handle.remove)

    def _begin_forward(self, *_: object) -> None:
        self._phase, self._micro_batch, self._num_checks = FORWARD, self._num_forwards, 0
        self._num_forwards += 1

    def _inputs(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._phase == FORWARD:
            self._check("input", self._names[module], module, (args, kwargs))

    def _output(self, module: nn.Module, _: object, output: Any) -> None:
        if self._phase == FORWARD:
            self._check("output", self._names[module], module, output)
        for tensor in _tensors(output):
            if tensor.requires_grad:
                self._keep(tensor.register_hook(partial(self._gradient_of_output, module, self._micro_batch)))

    def _gradient_of_output(self, module: nn.Module, micro_batch: int, gradient: Tensor) -> None:
        if (self._phase, self._micro_batch) != (BACKWARD, micro_batch):  # an output's gradient is the first thing a backward makes
            self._phase, self._micro_batch, self._num_checks = BACKWARD, micro_batch, 0
        self._check("gradient of output", self._names[module], module, gradient)

    def _gradient(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        flat, info = gradient.detach().reshape(-1), self.adapter.info(parameter)
        parts = [f.part.name for f in split_parts(parameter, info, 0, flat, flat) if not torch.isfinite(f.low).all()]
        self._check("gradient", "+".join(parts) or info.name, self._owners[id(parameter)], flat)

    def _loss(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        loss = inner(*args, **kwargs)
        self._check("output", "loss", self.root, loss)
        return loss

    # -- checks --------------------------------------------------------------------------------------------------------

    def _check(self, what: What, name: str, module: nn.Module, values: Any) -> None:
        self._num_checks += 1
        direction = -self.stage if self._phase == BACKWARD else self.stage
        place = (self._phase, self._micro_batch, direction, self._num_checks)
        self._look(place, what, name, type(module).__name__, list(_tensors(values)))

    def _look(self, place: tuple[int, int, int, int], what: What, name: str, module: str, tensors: list[Tensor]) -> None:
        if self.first is not None and self.first.place <= place:
            return
        with torch.no_grad():
            bad = sum(int((~torch.isfinite(t)).sum()) for t in tensors)
            if bad:
                nan, size = sum(int(torch.isnan(t).sum()) for t in tensors), sum(t.numel() for t in tensors)
                self.first = Sighting(place, self.rank, self.stage, what, name, module, bad, nan, size)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
