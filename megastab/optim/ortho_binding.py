"""OrthoAdam under an engine: from the wrapper's fragments to the plans of the tensors DeepSpeed steps it on."""

from __future__ import annotations

import re
import socket
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from megastab.config.errors import UserError
from megastab.optim import row_op
from megastab.optim.ortho_adam import OrthoAdam
from megastab.optim.ortho_gather import holdings, plan_matrices
from megastab.optim.ortho_plan import plan_flat, spans
from megastab.optim.ortho_segment import Segment
from megastab.parallel import collectives
from megastab.parallel.grid import Grid
from megastab.parallel.ownership import counts_here
from megastab.parallel.param_info import info_of
from megastab.wrappers.adapter import Adapter, Fragment

NO_CUT = "no row is cut: nothing is exchanged"


def bind_ortho_adam(adapter: Adapter, grid: Grid) -> str:
    """Plan the engine's OrthoAdam (collective over the job); what it rotates in a line, empty for any other optimizer.

    Loads need no second binding: they write into the same tensors.

    Raises:
        UserError: nothing is rotated, a parameter without a name, or whole matrices that do not fit into memory.
    """
    client: Any = getattr(adapter.optimizer, "optimizer", adapter.optimizer)
    if not isinstance(client, OrthoAdam) or not client.is_rotating:
        return ""
    with collectives.together("planning OrthoAdam"):
        refuse_strangers(client, adapter.engine.module)
        _refuse_shares_cut_across(client, adapter, grid)
        flats = adapter.stepped()
        segments = _segments(client, adapter, flats)
    row_group = grid.dp.group if adapter.is_partitioned else None
    matrix_group = grid.stage.group if adapter.is_partitioned else grid.tp.group
    rows_told = collectives.gather_objects_in([spans(held) for held in segments], row_group)  # here alone the layout is learnt
    matrices_told = collectives.gather_objects_in([holdings(held) for held in segments], matrix_group)
    client.plans = {}
    with collectives.together("planning OrthoAdam"):
        for place, (flat, held) in enumerate(zip(flats, segments, strict=True)):
            matrices = [ranks[place] for ranks in matrices_told]
            gathered = plan_matrices(held, client.rotation_for, matrices, collectives.rank_in(matrix_group), matrix_group)
            everyone = [ranks[place] for ranks in rows_told] if row_group is not None else []
            mine = collectives.rank_in(row_group)
            client.plans[id(flat)] = plan_flat(held, client.rotation_for, everyone, mine, row_group, flat.device, gathered)
    if client.settings["axes"] == "both":
        _refuse_too_large(client, flats)
    is_fast = client.settings["rotation"] == "hadamard" and client.settings["axes"] == "last"
    path = row_op.agree(is_fast and all(flat.device.type == "cpu" for flat in flats))
    return _description(client, adapter, grid, path)


def refuse_strangers(optimizer: Any, module: nn.Module) -> None:
    """Before an engine is built, whose partitions nothing would tell a parameter from that is not the module's.

    Raises:
        UserError: an OrthoAdam over a parameter that has no name in ``module``.
    """
    known = {id(p) for p in module.parameters()}
    for place, parameter in enumerate(optimizer.given if isinstance(optimizer, OrthoAdam) and optimizer.is_rotating else []):
        if id(parameter) not in known:
            shape = list(getattr(parameter, "ds_shape", parameter.shape))
            raise UserError(
                f"OrthoAdam: parameter {place} {shape} is not in the engine's module and so has no name, which its rotation depends on: "
                "make it a parameter of the module, or leave it to an optimizer of its own"
            )


def _refuse_shares_cut_across(client: OrthoAdam, adapter: Adapter, grid: Grid) -> None:
    names = _cut_across(adapter, grid)
    if names and client.settings["axes"] == "both":
        raise UserError(
            f'OrthoAdam: tensor parallelism cuts {", ".join(names)} along the last axis, and axes "both" puts matrices together along '
            'the first: choose axes "last", which rotates the shares, or AdamW'
        )


def _cut_across(adapter: Adapter, grid: Grid) -> list[str]:
    """Foreign matrices that Megatron's marks say are cut along the last axis over tensor-parallel ranks."""
    if grid.tp.size == 1:
        return []
    return [
        adapter.info(p).name
        for p in adapter.parameters()
        if info_of(p) is None and getattr(p, "tensor_model_parallel", False) and getattr(p, "partition_dim", 0) == 1
    ]


def _refuse_too_large(client: OrthoAdam, flats: list[Tensor]) -> None:
    """Whole matrices must fit beside the moments, which are made at the first step, on every host and accelerator."""
    assert client.plans is not None
    found = [(size, segment) for plan in client.plans.values() for size, segment in plan.temporaries]
    largest, segment = max(found, key=lambda each: each[0], default=(0, None))
    moments = sum(2 * flat.numel() * flat.element_size() for flat in flats if flat not in client.state)
    device = flats[0].device if flats else torch.device("cpu")
    where = socket.gethostname() if device.type == "cpu" else f"rank {collectives.world()[0]}"
    name = "" if segment is None or segment.left is None else f"{segment.name} [{segment.left.width}, {segment.width}]"
    every = collectives.gather_objects((where, largest, moments, available_bytes(device), name))
    for place in sorted({where for where, *_ in every}):
        here = [told for told in every if told[0] == place]
        free, (_, size, _, _, name) = min(told[3] for told in here), max(here, key=lambda told: told[1])
        needed = sum(told[1] + told[2] for told in here)
        if needed > free:
            collectives.fail_alike(
                f'OrthoAdam: axes "both" does not fit: {name} takes {size / 1e9:.3g} GB of temporaries on a rank; with the moments '
                f'{place} needs {needed / 1e9:.3g} GB for {len(here)} ranks and has {free / 1e9:.3g} GB: choose axes "last", which gathers '
                "no matrix, or a max_axis below this matrix's first dimension, or more memory"
            )


def available_bytes(device: torch.device) -> int:
    """Free memory where the flat tensors lie: of the host, shared by its ranks, or of this rank's accelerator."""
    return int(psutil.virtual_memory().available if device.type == "cpu" else get_accelerator().available_memory())


def _segments(client: OrthoAdam, adapter: Adapter, flats: list[Tensor]) -> list[list[Segment]]:
    """What each flat tensor holds."""
    order = sorted((flat.data_ptr(), place) for place, flat in enumerate(flats) if flat.numel())
    starts, found = [start for start, _ in order], [[] for _ in flats]  # type: ignore[var-annotated]
    for fragment in adapter.fragments():
        start, place = order[bisect_right(starts, fragment.master.data_ptr()) - 1]
        offset = (fragment.master.data_ptr() - start) // fragment.master.element_size()
        if not 0 <= offset <= flats[place].numel() - fragment.master.numel():
            raise RuntimeError(f"the master of {fragment.part.name} lies in no tensor the optimizer is stepped on")
        found[place].append(_segment(client, fragment, offset))
    return [sorted(held, key=lambda segment: segment.offset) for held in found]


def _segment(client: OrthoAdam, fragment: Fragment, offset: int) -> Segment:
    first = fragment.part.start * (fragment.info.width or 1) + fragment.start
    return client.segment(fragment.parameter, fragment.info, fragment.part, offset, first, fragment.master.numel())


def _description(client: OrthoAdam, adapter: Adapter, grid: Grid, path: str) -> str:
    counts, turned = Counter[str](), set()
    for parameter in adapter.parameters():
        if counts_here(parameter, grid.tp.rank):
            info = adapter.info(parameter)
            for part in info.parts:
                width, elements = client.row_width(parameter, info, part), part.rows * (info.width or 1)
                counts["all"] += elements
                counts["rotated"] += elements if width else 0
                counts["matrices"] += 1 if width and info.width and part.start == 0 else 0
                turned |= {width} if width else set()
    assert client.plans is not None
    cuts = [plan.cuts for plan in client.plans.values() if plan.cuts is not None]
    counts["cut rows"] = sum(cut.total for cut in cuts)
    counts["gathered"] = sum(len(plan.gathered.names) for plan in client.plans.values() if plan.gathered) if grid.tp.rank == 0 else 0
    every = collectives.gather_objects_in((counts, turned, len(cuts)), grid.model.group)
    cut_bytes, *price = _price(client)
    total: Counter[str] = sum((theirs for theirs, _, _ in every), Counter())
    if not total["rotated"]:
        collectives.fail_alike(
            f"OrthoAdam rotates nothing: no matrix has an axis of 2 to max_axis = {client.settings['max_axis']}: use AdamW, or raise it"
        )
    settings, share = client.settings, 100 * total["rotated"] / total["all"]
    widths = ", ".join(str(width) for width in sorted(set().union(*(theirs for _, theirs, _ in every))))
    exchanges = max(number for _, _, number in every)
    made = f"{client.rotation_bytes / 1e6:.1f} MB of rotations a rank, made in {client.rotation_seconds:.1f} s"
    said = (
        f"{total['matrices']} matrices, {share:.1f} % of the parameters, rotated ({settings['rotation']}, axes {settings['axes']}, rows of "
        f"{widths}; {made}) under {type(adapter.optimizer).__name__}, {path}; "
    )
    said += (
        f"{total['cut rows']} rows are cut: {exchanges} exchanges a step, up to {cut_bytes / 1e6:.2f} MB a rank" if exchanges else NO_CUT
    )
    said += _said_of_gathering(total["gathered"], price)
    if across := _cut_across(adapter, grid):
        said += (
            f"; cut along the last axis by tensor parallelism, so that shares are rotated and the run depends on tp: {', '.join(across)}"
        )
    if foreign := _residual_not_last(adapter):
        said += f"; stored with the residual axis first, so that another axis is rotated: {foreign}"
    return said


def _price(client: OrthoAdam) -> tuple[int, ...]:
    """The most on any rank of the job: bytes for cut rows; of whole matrices, exchanges and bytes sent a step, bytes of the largest."""
    plans = list((client.plans or {}).values())
    cut = sum(plan.cuts.num_bytes for plan in plans if plan.cuts is not None)
    gathered = [plan.gathered for plan in plans if plan.gathered is not None]
    exchanges, sent = sum(len(each.rounds) for each in gathered), sum(matrix.sent_bytes for each in gathered for matrix in each.mine)
    largest = max((size for plan in plans for size, _ in plan.temporaries), default=0)
    return tuple(map(max, zip(*collectives.gather_objects((cut, exchanges, sent, largest)), strict=True)))


def _said_of_gathering(number: int, price: Sequence[int]) -> str:
    exchanges, sent, largest = price
    if not largest:
        return ""
    said = f"; a whole matrix takes up to {largest / 1e6:.1f} MB while it is stepped"
    if not number:
        return f"{said}, and none is gathered"
    return f"{said}; {number} are gathered by {exchanges} exchanges, up to {sent / 1e6:.1f} MB sent a rank and step"


def _residual_not_last(adapter: Adapter) -> str:
    """Foreign matrices that write to the residual stream: torch's Linear stores them [residual, in]."""
    alike = Counter(
        re.sub(r"(?<=\.)\d+(?=\.)", "*", part.name)
        for p in adapter.parameters()
        if info_of(p) is None
        for part in adapter.info(p).parts
        if part.role in ("o", "down")
    )
    return ", ".join(f"{name} ({count})" for name, count in alike.items())
