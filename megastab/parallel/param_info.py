"""What a parameter is, in names and coordinates that do not depend on the layout.

A parameter may hold several logical matrices (fused q, k, v or gate and up) and only some rows of each (tensor parallel). Because
every matrix stores the residual dimension last, what a rank holds of it is always a range of whole rows, and merging ranks is a
concatenation along dim 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from megastab.parallel.collectives import Group
from megastab.parallel.grid import TensorParallel

Role = Literal[
    "embedding",
    "position",
    "head",
    "q",
    "k",
    "v",
    "o",
    "output_gate",
    "gate",
    "up",
    "down",
    "norm",
    "bias",
    "sink",
    "kv_bias",
    "scale",
    "other",
]
VECTOR_ROLES: frozenset[Role] = frozenset({"norm", "bias", "sink", "kv_bias", "scale"})


@dataclass(frozen=True)
class Part:
    """Rows [start, start + rows) of one logical matrix (or vector) of ``global_rows`` rows."""

    name: str
    role: Role
    global_rows: int
    start: int
    rows: int
    initial: float | None = None
    """What every element starts at; only for ``scale``, whose role does not say it."""

    @classmethod
    def whole(cls, name: str, role: Role, rows: int, initial: float | None = None) -> Part:
        """A matrix every rank holds whole."""
        return cls(name, role, rows, 0, rows, initial)

    @classmethod
    def cut(cls, name: str, role: Role, rows: int, tp: TensorParallel, copies: int = 1) -> Part:
        """A matrix cut over ``tp`` in equal shares, each share held by ``copies`` neighbouring ranks."""
        share = rows * copies // tp.size
        return cls(name, role, rows, tp.rank // copies * share, share)


@dataclass(frozen=True)
class ParamInfo:
    """What the rank-local tensor of one parameter holds, part after part along dim 0."""

    parts: tuple[Part, ...]
    layer: int | None = None
    """0-based block, global over pipeline stages; None outside the blocks."""
    width: int | None = None
    """Length of a row; None for vectors."""
    is_first_copy: bool = True
    """Whether no lower tp rank holds these very rows."""
    is_sharded: bool = False
    """Whether some other tp rank holds other rows."""
    grad_group: Group = None
    """Ranks whose local gradients are terms of one sum (token shards under sequence parallel, copies of a KV head); else None."""

    @property
    def name(self) -> str:
        """Canonical name of the parameter: its parts' names joined."""
        return "+".join(part.name for part in self.parts)

    @property
    def decays(self) -> bool:
        """Weight decay is for matrices; gains, biases, scales and sinks keep theirs."""
        return self.parts[0].role not in VECTOR_ROLES


def describe(parameter: nn.Parameter, info: ParamInfo) -> nn.Parameter:
    """Attach ``info`` and the flag DeepSpeed counts norms by; return the parameter."""
    parameter.megastab_info = info  # type: ignore[attr-defined]
    # DeepSpeed counts a parameter where this flag is set, or on tp rank 0. Set per rank to "first copy", that rule counts every
    # row once: also partly replicated KV heads, which flagging like sharded weights counts several times.
    parameter.tensor_model_parallel = info.is_sharded and info.is_first_copy  # type: ignore[attr-defined]
    return parameter


def info_of(parameter: nn.Parameter) -> ParamInfo | None:
    """What :func:`describe` attached; None for a foreign parameter."""
    return getattr(parameter, "megastab_info", None)
