"""Cutting a row of layers into consecutive stages. Plain arithmetic: the plan uses it where torch is not imported."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

_Cut = tuple[int, tuple[int, ...]]  # (score, boundaries so far)


def stage_bounds(costs: Sequence[int], num_stages: int) -> list[int]:
    """Boundaries [0, ..., len(costs)] of stages that each hold a layer, the costliest as cheap as can be.

    Among equal ones the most even (least sum of squares), then the earliest cuts: early stages hold more micro-batches in flight.
    """
    if not 1 <= num_stages <= len(costs):
        raise ValueError(f"{len(costs)} layers cannot be cut into {num_stages} stages that each hold one")
    prefix = [0, *accumulate(costs)]
    costliest, _ = _best(prefix, num_stages, None)
    return list(_best(prefix, num_stages, costliest)[1])


def _best(prefix: Sequence[int], num_stages: int, limit: int | None) -> _Cut:
    """Least largest stage cost; with a ``limit`` on every stage, least sum of squared costs."""
    best: dict[int, _Cut] = {0: (0, (0,))}
    for stage in range(1, num_stages + 1):
        following: dict[int, _Cut] = {}
        for stop in range(stage, len(prefix) - (num_stages - stage)):
            cuts = [_extended(cut, prefix[stop] - prefix[start], stop, limit) for start, cut in best.items() if start < stop]
            if allowed := [cut for cut in cuts if cut is not None]:
                following[stop] = min(allowed)
        best = following
    return best[len(prefix) - 1]


def _extended(cut: _Cut, cost: int, stop: int, limit: int | None) -> _Cut | None:
    score, bounds = cut
    if limit is None:
        return max(score, cost), (*bounds, stop)
    return (score + cost * cost, (*bounds, stop)) if cost <= limit else None
