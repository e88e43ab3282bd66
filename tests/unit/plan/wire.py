"""A log of what a step sends, kept by standing between torch.distributed and its process groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tests.jobs import start

Entry = tuple[str, tuple[int, ...]]
"""(kind, ranks of the group); of a send: where it goes."""


@dataclass
class Log:
    """Payload bytes of one rank by kind and group."""

    bytes: Counter[Entry] = field(default_factory=Counter)

    def note(self, kind: str, group: ProcessGroup, payload: Any, to: int | None = None) -> None:
        held = payload if isinstance(payload, list) else [payload]
        flat = [t for item in held for t in (item if isinstance(item, list) else [item])]
        ranks = tuple(torch.distributed.get_process_group_ranks(group))
        if len(ranks) == 1:
            return  # nothing leaves the rank
        entry = (kind, ranks if to is None else (to,))
        self.bytes[entry] += sum(t.numel() * t.element_size() for t in flat if isinstance(t, Tensor))


# Method of a process group -> (what the log calls it, place of the tensor that is the whole payload).
METHODS: dict[str, tuple[str, int]] = {
    "allreduce": ("all_reduce", 0),
    "all_gather_single": ("all_gather", 0),
    "_allgather_base": ("all_gather", 0),
    "allgather": ("all_gather", 0),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "_reduce_scatter_base": ("reduce_scatter", 1),
    "reduce_scatter": ("reduce_scatter", 1),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    "send": ("send", 0),
    "all_to_all_single": ("all_to_all", 1),
    "alltoall_base": ("all_to_all", 1),
    "alltoall": ("all_to_all", 1),
    "allreduce_coalesced": ("all_reduce", 0),
    "allgather_into_tensor_coalesced": ("all_gather", 0),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 1),
}


@contextmanager
def logged() -> Iterator[Log]:
    """While inside, every collective and every send of this rank is in the log."""
    log = Log()
    originals = {name: vars(ProcessGroup)[name] for name in METHODS if name in vars(ProcessGroup)}  # as bound, to be put back as they were

    def patched(name: str, original: Any) -> Callable[..., Any]:
        kind, place = METHODS[name]

        def call(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            log.note(kind, group, args[place], args[1] if kind == "send" else None)
            return original.__get__(group)(*args, **kwargs)

        return call

    for name, original in originals.items():
        setattr(ProcessGroup, name, patched(name, original))
    try:
        yield log
    finally:
        for name, original in originals.items():
            setattr(ProcessGroup, name, original)


def steps_sent(configs: list[dict[str, Any]], warm_up: int = 2) -> list[Counter[Entry]]:
    """For each config, the bytes that one step after ``warm_up`` others sends from this rank."""
    out = []
    for config in configs:
        job = start(config)
        for _ in range(warm_up):
            job.step()
        with logged() as log:
            job.step()
        out.append(log.bytes)
        job.built.engine.destroy()
        torch.distributed.barrier()
    return out
