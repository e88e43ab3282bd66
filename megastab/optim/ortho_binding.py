"""OrthoAdam under an engine: from the wrapper's fragments to the plans of the tensors DeepSpeed steps it on."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from typing import Any

from torch import Tensor

from megastab.optim import row_op
from megastab.optim.ortho_adam import OrthoAdam
from megastab.optim.ortho_plan import Segment, plan_flat, spans
from megastab.parallel import collectives
from megastab.parallel.grid import Grid
from megastab.parallel.ownership import counts_here
from megastab.parallel.param_info import info_of
from megastab.wrappers.adapter import Adapter, Fragment


def bind_ortho_adam(adapter: Adapter, grid: Grid) -> str:
    """Plan the engine's OrthoAdam (collective over the job); what it rotates in a line, empty for any other optimizer.

    Loads need no second binding: they write into the same tensors.

    Raises:
        UserError: nothing is rotated, or a setting that needs whole matrices where they are cut.
    """
    client: Any = getattr(adapter.optimizer, "optimizer", adapter.optimizer)
    if not isinstance(client, OrthoAdam) or not client.is_rotating:
        return ""
    _refuse_cut_matrices(client, adapter, grid)
    with collectives.together("planning OrthoAdam"):
        flats = adapter.stepped()
        segments = _segments(client, adapter, flats)
    group = grid.dp.group if adapter.is_partitioned else None
    told = collectives.gather_objects_in([spans(held) for held in segments], group)  # the only place that learns the layout
    client.plans = {}
    with collectives.together("planning OrthoAdam"):
        for place, (flat, held) in enumerate(zip(flats, segments, strict=True)):
            everyone = [ranks[place] for ranks in told] if group is not None else []
            client.plans[id(flat)] = plan_flat(held, client.rotation_for, everyone, collectives.rank_in(group), group, flat.device)
    is_fast = client.settings["rotation"] == "hadamard" and client.settings["axes"] == "last"
    path = row_op.agree(is_fast and all(flat.device.type == "cpu" for flat in flats))
    return _description(client, adapter, grid, path)


def _refuse_cut_matrices(client: OrthoAdam, adapter: Adapter, grid: Grid) -> None:
    if client.settings["axes"] == "both" and (adapter.is_partitioned or grid.tp.size > 1):
        collectives.fail_alike(
            'OrthoAdam: axes "both" needs whole matrices on every rank, and ZeRO or tensor parallelism cuts them: run at ZeRO stage 0 with '
            'tensor 1, or choose axes "last", which is exact at any layout'
        )


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
    every = collectives.gather_objects_in((counts, turned, len(cuts)), grid.model.group)
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
    said += f"{total['cut rows']} rows are cut: {exchanges} exchanges a step" if exchanges else "no row is cut: nothing is exchanged"
    if foreign := _residual_not_last(adapter):
        said += f"; stored with the residual axis first, so that another axis is rotated: {foreign}"
    return said


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
