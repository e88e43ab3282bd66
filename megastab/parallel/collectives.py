"""The collectives megastab adds to DeepSpeed's, and the only file that imports ``torch.distributed``.

Rows are dim 0. Every function takes its group; none reads a global one. A group of ``None`` is a group of one rank: nothing is sent.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from megastab.config.errors import UserError
from megastab.parallel.waiting import Counted, Waiting

Group = Any  # torch.distributed.ProcessGroup, or None for a group of one
Store = Any  # torch.distributed.Store: a table all ranks read and write
Work = Any  # what an asynchronous collective returns


class PeerFailed(Exception):
    """Another rank failed and has already said why; this one leaves quietly, with the same exit code."""

    def __init__(self, message: str, exit_code: int = UserError.exit_code):
        super().__init__(message)
        self.exit_code = exit_code


def count_waiting(waiting: Waiting | None) -> None:
    """Have the time this process stands in the collectives of this file counted, or no longer."""
    global dist
    dist = torch.distributed if waiting is None else Counted(torch.distributed, waiting)  # type: ignore[assignment]


def is_initialized() -> bool:
    """Whether this process belongs to a job."""
    return dist.is_available() and dist.is_initialized()


def world() -> tuple[int, int]:
    """(rank, number of ranks) of the job; (0, 1) outside one."""
    return (dist.get_rank(), dist.get_world_size()) if is_initialized() else (0, 1)


def job_store(keeps: bool, seconds: float) -> Store:
    """The store at MASTER_ADDR:MASTER_PORT that the backend will meet at too, by names of this start of the job (a restart has its own).

    ``keeps``: this process serves it, to the backend as well. Nobody is waited for.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    world_size, patience = int(os.environ["WORLD_SIZE"]), timedelta(seconds=seconds)
    store = dist.TCPStore(address, port, world_size, keeps, patience, wait_for_workers=False, multi_tenant=True)
    return dist.PrefixStore(f"megastab/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def group_size(group: Group) -> int:
    """Ranks in ``group``."""
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: Group) -> int:
    """This rank's place in ``group``."""
    return 0 if group is None else dist.get_rank(group)


def job_group() -> Group:
    """All ranks of the job; None where there is one."""
    return dist.group.WORLD if world()[1] > 1 else None


def new_groups(ranks_by_group: Sequence[Sequence[int]], backend: str | None = None) -> Group:
    """Make disjoint groups (collective over the whole job); return this rank's, or None if it would be alone in it."""
    if max(len(ranks) for ranks in ranks_by_group) == 1:
        return None
    mine, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in ranks_by_group], backend=backend)
    return mine


def own_group() -> Group:
    """A real group that holds this rank alone, for callers who cannot do without one (collective over the job)."""
    mine, _ = dist.new_subgroups_by_enumeration([[rank] for rank in range(dist.get_world_size())])
    return mine


def sum_(tensor: Tensor, group: Group, async_op: bool = False) -> Work | None:
    """Sum ``tensor`` over ``group`` in place; with ``async_op`` return the work to wait for (None for a group of one)."""
    return None if group is None else dist.all_reduce(tensor, group=group, async_op=async_op)


def max_(values: Tensor, group: Group) -> None:
    """Elementwise maximum of a small table over ``group`` in place, through the accelerator where the backend only reaches that."""
    if group is not None:
        staged = values.to(get_accelerator().current_device_name())
        dist.all_reduce(staged, op=dist.ReduceOp.MAX, group=group)
        values.copy_(staged)


def gather_rows(tensor: Tensor, group: Group, async_op: bool = False) -> tuple[Tensor, Work | None]:
    """Concatenate every rank's rows in rank order. Returns the result and the work (None if already done)."""
    if group is None:
        return tensor, None
    shape = (tensor.shape[0] * group_size(group), *tensor.shape[1:])
    out = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    work = dist.all_gather_into_tensor(out, tensor.contiguous(), group=group, async_op=async_op)
    return out, work


def scatter_rows_sum(tensor: Tensor, group: Group, async_op: bool = False) -> tuple[Tensor, Work | None]:
    """Sum over ``group`` and keep this rank's equal share of the rows. Returns the share and the work."""
    if group is None:
        return tensor, None
    rows, rest = divmod(tensor.shape[0], group_size(group))
    if rest:
        raise ValueError(f"{tensor.shape[0]} rows cannot be cut into {group_size(group)} equal shares")
    out = torch.empty((rows, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
    work = dist.reduce_scatter_tensor(out, tensor.contiguous(), group=group, async_op=async_op)
    return out, work


def wait(work: Work | None) -> None:
    """Wait for an asynchronous collective, if there is one."""
    if work is not None:
        work.wait()


def exchange_rows(rows: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> tuple[Tensor, Work | None]:
    """Give ``send[r]`` of ``rows`` to each rank r and take ``receive[r]`` from it, in rank order, with one all-to-all.

    Returns what :func:`arrived_rows` turns into the rows received. Ranks that share nothing send nothing.
    """
    if group is None:
        return rows[: sum(receive)], None
    staged = rows.to(get_accelerator().current_device_name())  # the backend may reach the accelerator only
    out = torch.empty((sum(receive), *rows.shape[1:]), dtype=rows.dtype, device=staged.device)
    return out, dist.all_to_all_single(out, staged.contiguous(), list(receive), list(send), group=group, async_op=True)


def exchange_equal(tensor: Tensor, group: Group) -> Tensor:
    """Give each rank of ``group`` its equal share of the rows and take its own from each, in rank order (all-to-all)."""
    if group is None:
        return tensor
    out = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, tensor.contiguous(), group=group)
    return out


def arrived_rows(rows: Tensor, work: Work | None, device: torch.device) -> Tensor:
    """Wait for :func:`exchange_rows`; the rows received, on ``device``."""
    wait(work)
    return rows.to(device)


def sum_coalesced_(tensors: Sequence[Tensor], group: Group) -> None:
    """Sum many tensors over ``group`` in fp32 with one all-reduce, in place, whatever their dtype or device."""
    if group is None or not tensors:
        return
    device = get_accelerator().current_device_name()  # masters may live on the CPU while the backend only reaches the accelerator
    flat = torch.cat([t.detach().reshape(-1).to(device=device, dtype=torch.float32) for t in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, piece in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.detach().copy_(piece.view_as(tensor))


def sum_scalars(values: Sequence[float], group: Group) -> list[float]:
    """Sum a few numbers over ``group`` in fp64 with one all-reduce."""
    if group is None:
        return list(values)
    device = get_accelerator().current_device_name()
    buffer = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(buffer, group=group)
    return buffer.tolist()


def sum_doubles_(values: Tensor, group: Group) -> None:
    """Sum a small fp64 table over ``group`` in place, through the accelerator where the backend only reaches that."""
    if group is not None:
        staged = values.to(get_accelerator().current_device_name())
        dist.all_reduce(staged, group=group)
        values.copy_(staged)


def gather_doubles(values: Sequence[float]) -> Tensor:
    """Every rank's equally many ``values``, fp64 [ranks of the job, values], on the CPU of each; one all-gather."""
    mine = torch.tensor([list(values)], dtype=torch.float64, device=get_accelerator().current_device_name())
    return gather_rows(mine, job_group())[0].cpu()


def own_channel() -> list[Group]:
    """Groups for :func:`any_of`, beside the job's and on the CPU: what they send waits for no kernel (collective over the job).

    The ranks stand in a table, as near a square as their number divides into; a rank is in the group of its row and in that of its
    column. One group of all would hold a connection for each pair of ranks, more than a process may have open from a thousand ranks on.
    """
    size = world()[1]
    width = size // max(height for height in range(1, math.isqrt(size) + 1) if size % height == 0)
    rows = [range(first, first + width) for first in range(0, size, width)]
    columns = [range(place, size, width) for place in range(width)]
    return [group for ranks in (rows, columns) if (group := new_groups(ranks, "gloo")) is not None]


def any_of(flag: bool, channel: Sequence[Group]) -> bool:
    """Whether ``flag`` is set on any rank: one integer, its maximum over this rank's row and then, of those, over its column."""
    found = torch.tensor([int(flag)])
    for group in channel:
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return bool(found)


def from_first(value: Any) -> Any:
    """The first rank's ``value``, on every rank of the job."""
    return gather_objects(value if world()[0] == 0 else None)[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's ``value``, on every rank of the job."""
    return gather_objects_in(value, dist.group.WORLD) if is_initialized() else [value]


def gather_objects_in(value: Any, group: Group) -> list[Any]:
    """Every rank's ``value``, on every rank of ``group``."""
    if group is None:
        return [value]
    out: list[Any] = [None] * group_size(group)
    dist.all_gather_object(out, value, group=group)
    return out


def barrier() -> None:
    """Wait for every rank of the job."""
    if is_initialized():
        dist.barrier()


def leave() -> None:
    """Leave the job together: exiting without this can abort in the backend's threads."""
    if is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def fail_alike(message: str, kind: type[UserError] = UserError) -> NoReturn:
    """End the job over something every rank has found alike: the first rank says it, the others leave quietly."""
    if world()[0] == 0:
        raise kind(message)
    raise PeerFailed(message, kind.exit_code)


@contextmanager
def together(doing: str) -> Iterator[None]:
    """Run a block on every rank; if a UserError ends it anywhere, it ends everywhere, told once (by the lowest rank it hit).

    Collective over the whole job at exit, so the block itself must not leave ranks waiting inside a collective.
    """
    failure: UserError | None = None
    try:
        yield
    except UserError as error:
        failure = error
    messages = gather_objects(None if failure is None else str(failure))
    first = next((rank for rank, message in enumerate(messages) if message is not None), None)
    if first is None:
        return
    if first == world()[0]:
        assert failure is not None
        raise failure
    raise PeerFailed(f"rank {first} failed while {doing}: {messages[first]}")
