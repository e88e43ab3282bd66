"""One kind of message of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megastab.config.config import Config

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send"]
Group = Literal["tensor", "context", "data", "pipeline", "model", "heads", "ends"]
"""context: ranks that share a sequence; data: all copies of the weights, these ranks included; model: tensor x pipeline; heads:
tensor-parallel ranks that share a KV head; ends: first and last stage, which hold a tied matrix."""


@dataclass(frozen=True)
class Transfer:
    """What one rank hands to one group over a step."""

    what: str
    kind: Collective
    group: Group
    bytes: int
    """Payload of all calls."""
    calls: int
    """Where buckets are filled, as many as the elements fill."""

    @classmethod
    def many(cls, what: str, kind: Collective, group: Group, payload: int, calls: int) -> Transfer:
        """``calls`` of ``payload`` bytes each."""
        return cls(what, kind, group, payload * calls, calls)


def kv_copies(config: Config) -> int:
    """Tensor-parallel ranks that hold each KV head."""
    return max(1, config.layout.tensor // config.megastab.model.num_kv_heads)


def ranks_of(config: Config, group: str) -> int:
    """Ranks in a group."""
    layout = config.layout
    sizes = {"tensor": layout.tensor, "context": layout.context, "data": layout.copies, "pipeline": layout.pipeline}
    return {**sizes, "model": layout.tensor * layout.pipeline, "heads": kv_copies(config), "ends": 2 if layout.pipeline > 1 else 1}[group]
