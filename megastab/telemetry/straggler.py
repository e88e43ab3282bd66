"""Which rank holds the others up: own seconds of every rank over a window of steps, compared within each pipeline stage.

A rank's own seconds are a step's wall time less what it stood in collectives (``parallel.waiting``). It is slow when the median of its own
seconds over the window is at least ``1 + over`` times the median of its peers, the ranks of its stage (of an even number the lower
middle one, so that of two ranks the slow one has the fast one to be measured by). A rank alone in its stage has none to be compared with.
Pure, and without torch: the report judges by it too. ``rank_times`` is where the seconds come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, median_low
from typing import Any, NamedTuple

from megastab.config.schema_telemetry import StragglerConfig
from megastab.stability.record import Event

DIGITS = 4  # of a ratio or a time that is written down


class Peer(NamedTuple):
    """Where a rank runs."""

    host: str
    stage: int


class Pace(NamedTuple):
    """One rank against its peers: medians over a window, in seconds a step."""

    rank: int
    own: float
    peers: float
    """The lower median of its stage, itself included."""
    data: float
    """Of ``own``, fetching samples; NaN where nobody can tell."""
    peers_data: float

    @property
    def ratio(self) -> float:
        """Own seconds over its peers'."""
        return self.own / self.peers if self.peers > 0 else math.nan

    @property
    def cause(self) -> str:
        """``data`` or ``computing``, whichever makes more of the difference; empty where fetching is not known."""
        if math.isnan(self.data):
            return ""
        more_data = self.data - self.peers_data
        return "data" if 2 * more_data >= self.own - self.peers else "computing"


def medians(own: Sequence[float], data: Sequence[float]) -> tuple[float, float]:
    """Of one rank's steps; NaN for none. One slow step does not move them."""
    return (median(own), median(data)) if own else (math.nan, math.nan)


def paces(own: Sequence[float], data: Sequence[float], stages: Sequence[int]) -> list[Pace]:
    """Every rank that has peers, against them.

    Args:
        own: by rank, the median of its own seconds over the window.
        data: by rank, of these fetching samples.
        stages: by rank, its pipeline stage.
    """
    found = []
    for stage in sorted(set(stages)):
        ranks = [rank for rank, of in enumerate(stages) if of == stage and not math.isnan(own[rank])]
        if len(ranks) > 1:
            middle, middle_data = (median_low([column[rank] for rank in ranks]) for column in (own, data))
            found += [Pace(rank, own[rank], middle, data[rank], middle_data) for rank in ranks]
    return sorted(found)


def slowest_first(found: Sequence[Pace], over: float) -> list[Pace]:
    """The ranks that need at least ``1 + over`` times what their peers need."""
    return sorted((pace for pace in found if pace.ratio >= 1 + over), key=lambda pace: -pace.ratio)


@dataclass(frozen=True)
class Window:
    """What a window of steps told, the same on every rank."""

    step: int
    """The last step."""
    num_steps: int
    own: list[float]
    """By rank, the median of its own seconds."""
    data: list[float]
    """By rank, of these fetching samples."""
    stages: list[int]
    over: float = 0.0
    """From this share above the median on a rank is slow."""
    events: tuple[Event, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A line of ``rank_times.jsonl``."""
        columns = {"own_seconds": _rounded(self.own), "data_seconds": _rounded(self.data), "stages": self.stages}
        return {"step": self.step, "steps": self.num_steps, "over": self.over, **columns}

    def scalars(self) -> dict[str, float]:
        """By key of ``tags.TAGS``."""
        found = paces(self.own, self.data, self.stages)
        known = [own for own in self.own if not math.isnan(own)]
        values = {"own_seconds": median_low(known)} if known else {}
        return values | ({"slowest_over_median": max(pace.ratio for pace in found)} if found else {})


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(value) else float(f"{value:.{DIGITS}g}") for value in values]


class Straggler:
    """Who is slow, as the windows tell it one after another; pure.

    Args:
        config: from when on a rank is slow.
        peers: by rank, where it runs.
    """

    def __init__(self, config: StragglerConfig, peers: Sequence[Peer]):
        self.config, self.peers = config, peers
        self.told: list[int] = []
        """Ranks told to be slow that have not recovered."""

    def judge(self, step: int, num_steps: int, found: Sequence[Pace]) -> list[Event]:
        """What is new: a slow rank that has not been told, or that all of those told have recovered.

        A rank recovers below half the share it was named for, so that one at the limit does not come and go.
        """
        slow, by_rank = slowest_first(found, self.config.over), {pace.rank: pace for pace in found}
        before = self.told
        self.told = [r for r in before if r in by_rank and by_rank[r].ratio >= 1 + self.config.over / 2]
        if slow and slow[0].rank not in self.told:
            self.told += [pace.rank for pace in slow if pace.rank not in self.told]
            return [self._begins(step, num_steps, slow)]
        if before and not self.told:
            return [self._is_over(step, [by_rank[rank] for rank in before if rank in by_rank])]
        return []

    def _named(self, rank: int) -> str:
        stages = {peer.stage for peer in self.peers}
        return f"rank {rank} on {self.peers[rank].host}" + (f" (stage {self.peers[rank].stage})" if len(stages) > 1 else "")

    def _begins(self, step: int, num_steps: int, slow: Sequence[Pace]) -> Event:
        worst, also = slow[0], [pace.rank for pace in slow[1:]]
        peer = self.peers[worst.rank]
        said = f"{self._named(worst.rank)} needs {worst.ratio:.3g} times what its peers need: {worst.own:.3g} s of its own a step against "
        said += f"{worst.peers:.3g} s (medians of {num_steps} steps)"
        said += {"data": "; it is slow at fetching data", "computing": "; it is slow at computing, not at fetching data"}.get(
            worst.cause, ""
        )
        if also:
            said += f"; slow as well: {_listed(also)}"
        facts = {"rank": worst.rank, "host": peer.host, "stage": peer.stage, "own_seconds": worst.own, "median_seconds": worst.peers}
        facts |= {"ratio": worst.ratio, "cause": worst.cause, "data_seconds": worst.data, "also": also, "is_over": False}
        return Event(step, "straggler", said, facts)

    def _is_over(self, step: int, recovered: Sequence[Pace]) -> Event:
        ranks = [pace.rank for pace in recovered]
        said = f"{_listed(ranks)} {'is' if len(ranks) == 1 else 'are'} as fast as the others again: nobody is slow now"
        return Event(step, "straggler", said, {"ranks": ranks, "is_over": True})


def _listed(ranks: Sequence[int], shown: int = 8) -> str:
    more = f" and {len(ranks) - shown} more" if len(ranks) > shown else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks[:shown]))}{more}"
