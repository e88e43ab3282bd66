"""What every wrapper can be asked, whatever DeepSpeed calls it inside.

DeepSpeed forms the global gradient norm, assigns it to ``_global_grad_norm``, reads ``clip_grad``, steps and publishes. After
``deepspeed.initialize`` the wrapper's class is exchanged for a subclass whose setter and getter for these two names are ours: that is
the seam where the norm is known and the clip factor not yet formed, in every wrapper, with no collective of our own.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import deepspeed
import torch
from torch import Tensor, nn

from megastab.parallel.foreign import foreign_info
from megastab.parallel.grid import ALONE, TensorParallel
from megastab.parallel.param_info import ParamInfo, Part, info_of

DEEPSPEED_VERSION = "0.19.8"


class UnsupportedEngine(RuntimeError):
    """This DeepSpeed engine cannot be driven; the message names what is missing."""


class Fragment(NamedTuple):
    """The piece of one logical matrix whose fp32 master this rank owns."""

    parameter: nn.Parameter
    info: ParamInfo
    part: Part
    start: int
    """First element, in the rank-local matrix of ``part`` flattened; the piece is ``master.numel()`` long."""
    master: Tensor
    """fp32 view, 1-D."""
    copy: Tensor
    """What holds the low-precision copy, in any shape; the master itself where there is none."""
    copy_start: int = 0
    """First element in ``copy``."""

    @property
    def low(self) -> Tensor:
        """The same elements of the low-precision copy, 1-D."""
        return self.copy.data.view(-1).narrow(0, self.copy_start, self.master.numel())


@dataclass(frozen=True)
class GradientPiece:
    """The piece of one logical matrix's reduced gradient that this rank will update with."""

    parameter: nn.Parameter
    info: ParamInfo
    part: Part
    values: Tensor
    """1-D view, still multiplied by the fp16 loss scale; what is written to it reaches the update."""


def cut_by_part(info: ParamInfo, first: int, length: int) -> Iterator[tuple[Part, int, slice]]:
    """Elements [first, first + length) of a rank-local parameter by logical matrix: (part, first element in it, where in the range)."""
    offset = 0
    for part in info.parts:
        stop = offset + part.rows * (info.width or 1)
        low_end, high_end = max(first, offset), min(first + length, stop)
        if low_end < high_end:
            yield part, low_end - offset, slice(low_end - first, high_end - first)
        offset = stop


def split_parts(
    parameter: nn.Parameter, info: ParamInfo, first: int, master: Tensor, copy: Tensor, copy_first: int = 0
) -> Iterator[Fragment]:
    """Cut elements [first, first + len(master)) of a rank-local parameter into pieces of its logical matrices.

    ``copy`` holds the same elements in low precision from its ``copy_first`` on.
    """
    for part, start, here in cut_by_part(info, first, master.numel()):
        length = here.stop - here.start
        piece = master if length == master.numel() else master.narrow(0, here.start, length)
        yield Fragment(parameter, info, part, start, piece, copy, copy_first + here.start)


NORM_BLOCK = 1 << 12  # elements; a block's error is 3e-7 also where a few entries carry the norm, and blocks cost no time


def block_norms(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Tensors whose norms are the gradients': on CPU the norms of their blocks, elsewhere the gradients themselves.

    Torch's CPU kernel adds squares one after another in fp32: over a whole matrix it is 4e-3 off at 5e7 elements, and by another amount
    at every layout. Accelerators sum in a tree.
    """
    return [_norms_of_blocks(g.reshape(-1)) if g.device.type == "cpu" else g for g in gradients]


def _norms_of_blocks(flat: Tensor) -> Tensor:
    whole = flat.numel() // NORM_BLOCK * NORM_BLOCK
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_BLOCK), dim=-1, dtype=torch.float32)
    return torch.cat([blocks, torch.linalg.vector_norm(flat[whole:], dtype=torch.float32).view(1)])


class Adapter(ABC):
    """The verbs of one wrapper around one engine. Callbacks registered here run on every rank, in the order of a step."""

    relies_on: ClassVar[tuple[str, ...]] = ()
    """Private attributes of the wrapper this adapter reads; missing ones are refused by name."""
    is_partitioned: ClassVar[bool] = True
    """Whether data-parallel ranks own different fragments; otherwise each holds them all."""
    partitions_weights: ClassVar[bool] = False
    """Whether the low-precision weights are cut as well (ZeRO 3), so that a whole one must be gathered."""
    tp: TensorParallel = ALONE
    """Tensor-parallel axis foreign parameters are described on; our own carry their description."""
    reduces_in_backward: ClassVar[bool] = False
    """Whether gradients leave ``param.grad`` during backward (ZeRO 2 and 3), so that only tensor hooks see them."""

    def __init__(self, engine: Any):
        self.engine, self.optimizer = engine, engine.optimizer
        self.cap = float(engine.gradient_clipping())
        """The JSON's ``gradient_clipping``; 0 means none."""
        self.norm: float | None = None
        self.skipping = False
        self.in_step = False
        self._listeners: list[Callable[[float], None]] = []
        self._after_update: list[Callable[[], bool]] = []
        self._limit: float | None = None
        self._armed = False
        self._parameters = [p for p in engine.module.parameters() if p.requires_grad]  # as the optimizer found them
        self._names = {id(p): name for name, p in engine.module.named_parameters()}
        missing = [name for name in self.relies_on if not hasattr(self.optimizer, name)]
        if missing:
            raise UnsupportedEngine(f"DeepSpeed {deepspeed.__version__}: {type(self.optimizer).__name__} lacks {', '.join(missing)}")

    # -- verbs ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def fragments(self) -> Iterator[Fragment]:
        """Every fp32 master piece this rank owns, in parameter order."""

    @abstractmethod
    def stepped(self) -> list[Tensor]:
        """The tensors the client optimizer is stepped on, in one order on all data-parallel ranks; every master lies in one of them."""

    @abstractmethod
    def publish(self) -> None:
        """Make every low-precision weight from its master, on every rank, outside a step (collective over data-parallel ranks)."""

    @abstractmethod
    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """This rank's accumulated gradient before it is reduced over data-parallel ranks; None where there is none."""

    @abstractmethod
    def reduced(self, parameter: nn.Parameter) -> tuple[int, Tensor] | None:
        """(first element, 1-D view) of this rank's share of a reduced gradient, inside an ``on_norm`` listener; None where it has none."""

    def reduced_gradients(self) -> Iterator[GradientPiece]:
        """From inside an ``on_norm`` listener: the gradients the update will see, before loss scale and clip factor are taken out.

        Where ``is_partitioned`` data-parallel ranks hold different pieces, otherwise equal copies.
        """
        for parameter in self.parameters():
            share = self.reduced(parameter)
            if share is not None:
                info = self.info(parameter)
                for part, _, here in cut_by_part(info, share[0], share[1].numel()):
                    yield GradientPiece(parameter, info, part, share[1][here])

    def parameters(self) -> list[nn.Parameter]:
        """Trainable parameters in module order."""
        return list(self._parameters)

    def info(self, parameter: nn.Parameter) -> ParamInfo:
        """The parameter's description, made from its name if it is foreign."""
        return info_of(parameter) or foreign_info(parameter, self._names[id(parameter)], self.tp)

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """(parameter, accumulated gradient) at the boundary of a step, before reduction over data-parallel ranks."""
        for parameter in self.parameters():
            gradient = self.gradient(parameter)
            if gradient is not None:
                yield parameter, gradient

    def on_norm(self, listener: Callable[[float], None], first: bool = False) -> None:
        """Call ``listener(norm)`` exactly once a step, when the norm is known and nothing has been clipped; inf means a bad step.

        With ``first`` it is called before those that are there, which may scale gradients.
        """
        self._listeners.insert(0 if first else len(self._listeners), listener)

    def after_update(self, edit: Callable[[], bool]) -> None:
        """Call ``edit()`` when the masters are updated and not yet published; it returns whether it changed any."""
        self._after_update.append(edit)

    def set_scale(self, scale: float) -> None:
        """From inside an ``on_norm`` listener: multiply this step's gradients by ``scale`` in (0, 1], in place of the JSON's cap."""
        assert self.norm is not None, "set_scale belongs inside an on_norm listener"
        # DeepSpeed multiplies by clip_grad / (norm + 1e-6) where that is below 1; inf leaves the gradients alone.
        self._limit = math.inf if scale == 1.0 else (self.norm + 1e-6) * scale

    def scaler_recovers(self) -> bool:
        """Whether a non-finite norm is the fp16 loss scale's business: it is dynamic and can still fall."""
        scaler: Any = getattr(self.optimizer, "loss_scaler", None)
        return bool(getattr(scaler, "dynamic", False)) and scaler.cur_scale > scaler.min_scale

    def skip(self) -> None:
        """From inside an ``on_norm`` listener: leave masters, moments, schedule and loss scale as they are."""
        self.skipping = True

    # -- what subclasses call --------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Forget the last step's decision and listen for one norm."""
        self.norm, self._limit, self.skipping, self._armed, self.in_step = None, None, False, True, True

    def observe(self, norm: float) -> None:
        """Tell the listeners, once a step. A negative norm is a sentinel DeepSpeed replaces by inf a moment later."""
        if self._armed and not norm < 0:
            self._armed, self.norm = False, norm
            for listener in self._listeners:
                listener(norm)

    @property
    def limit(self) -> float:
        """The ``clip_grad`` DeepSpeed is to apply: the step's decision inside a step, the JSON's cap outside one."""
        return self.cap if self._limit is None else self._limit

    def end_step(self) -> None:
        """Outside a step the cap is what checkpoints and loggers see."""
        self._armed, self._limit, self.in_step = False, None, False

    def updated(self) -> bool:
        """Run the ``after_update`` edits; whether any changed a master."""
        return not self.skipping and any([edit() for edit in self._after_update])  # noqa: C419 (a list: every edit runs)


def specialise(instance: Any, **overrides: Any) -> None:
    """Exchange the class of ``instance`` for a subclass with ``overrides`` (``isinstance`` and the class name stay)."""
    base = type(instance)
    instance.__class__ = type(base.__name__, (base,), overrides)


def hook_wrapper(adapter: Adapter, **overrides: Any) -> None:
    """Install the norm seam, the clip getter and the skip gate on a ZeRO-style wrapper (one that assigns ``_global_grad_norm``)."""
    optimizer, base = adapter.optimizer, type(adapter.optimizer)
    client = optimizer.optimizer
    held = {"norm": optimizer.__dict__.pop("_global_grad_norm", 0.0)}
    optimizer.__dict__.pop("clip_grad", None)

    def set_norm(_: Any, value: Any) -> None:
        held["norm"] = value
        if value is not None:
            adapter.observe(float(value))  # DeepSpeed has already waited for this value

    def step(self: Any, closure: Any = None) -> Any:
        adapter.begin_step()
        try:
            result = base.step(self, closure)
        finally:
            adapter.end_step()
        if adapter.skipping:
            self.overflow = True  # the engine then counts a skipped step and leaves the schedule alone
        return result

    update = client.step

    @functools.wraps(update)  # keeps the mark by which torch's schedulers know a step they watch
    def gated(*args: Any, **kwargs: Any) -> Any:
        return None if adapter.skipping else update(*args, **kwargs)

    client.step = gated
    specialise(
        optimizer,
        _global_grad_norm=property(lambda _: held["norm"], set_norm),
        clip_grad=property(lambda _: adapter.limit, lambda _, value: None),  # a checkpoint must not restore an old cap
        step=torch.no_grad()(step),
        **overrides,
    )


def skip_lone_reduction(engine: Any) -> None:
    """With one data-parallel rank there is nothing to reduce, but DeepSpeed would copy all gradients into a bucket and back."""
    if engine.dp_world_size == 1:
        engine.buffered_allreduce_fallback = lambda *args, **kwargs: None


def defer_growth(adapter: Adapter) -> dict[str, Any]:
    """Overrides that move a loss scale's growth to the end of the step.

    DeepSpeed 0.19.8 updates the scale before it unscales: on each growth step the gradients are divided by the new scale while they
    carry the old one, and come out halved.
    """
    base = type(adapter.optimizer)
    pending = {"growth": False}

    def update_scale(self: Any, has_overflow: bool = False) -> None:
        if has_overflow:
            base._update_scale(self, True)
        else:
            pending["growth"] = True

    def step(self: Any, closure: Any = None) -> Any:
        pending["growth"] = False
        result = base.step(self, closure)
        if pending["growth"] and not adapter.skipping:
            base._update_scale(self, False)
        return result

    return {"_update_scale": update_scale, "step": torch.no_grad()(step)}


def check_version() -> None:
    """Refuse a DeepSpeed whose inside has not been read."""
    if deepspeed.__version__.split("+")[0] != DEEPSPEED_VERSION:
        raise UnsupportedEngine(
            f"megastab drives deepspeed {DEEPSPEED_VERSION}, found {deepspeed.__version__}: pip install deepspeed==0.19.8"
        )
