"""Samples left out of the stream: ranges of global sample indexes, both ends included.

A step takes the next samples that are not left out, so that its samples are a function of the position and of this list alone. The
position stays one integer: one past the last sample taken, those passed over included. The order in which ranges were added, and how
often, changes nothing.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Skips:
    """Disjoint ranges in ascending order, none touching the next; build one with :meth:`of`."""

    ranges: tuple[tuple[int, int], ...] = ()
    """(first, last) of each range, both left out."""

    @classmethod
    def of(cls, pairs: Iterable[Sequence[int]]) -> Skips:
        """From (first, last) pairs in any order; those that overlap or touch become one."""
        merged: list[tuple[int, int]] = []
        for first, last in sorted((int(first), int(last)) for first, last in pairs):
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
            else:
                merged.append((first, last))
        return cls(tuple(merged))

    def __or__(self, other: Skips) -> Skips:
        return Skips.of((*self.ranges, *other.ranges))

    def take(self, position: int, count: int) -> np.ndarray:
        """The next ``count`` samples from ``position`` on, int64 [count]."""
        number = bisect_left(self.ranges, position, key=_last)  # the first range that does not end before the position
        pieces = []
        for first, last in self.ranges[number:]:
            if count == 0:
                break
            run = min(max(first - position, 0), count)
            pieces.append(np.arange(position, position + run))
            count -= run
            position = last + 1
        return np.concatenate([*pieces, np.arange(position, position + count)]).astype(np.int64)

    def back(self, position: int, count: int) -> int:
        """The first of the ``count`` samples last taken before ``position``; 0 where there were fewer."""
        number = bisect_right(self.ranges, position - 1, key=_first)
        for first, last in reversed(self.ranges[:number]):
            end = min(last, position - 1)  # a range may begin before the position and end behind it
            if position - end - 1 >= count:
                break
            count -= position - end - 1
            position = first
        return max(position - count, 0)

    def within(self, first: int, last: int) -> list[list[int]]:
        """What is left out of [first, last]."""
        return [[max(a, first), min(b, last)] for a, b in self.ranges if a <= last and b >= first]


def _first(pair: tuple[int, int]) -> int:
    return pair[0]


def _last(pair: tuple[int, int]) -> int:
    return pair[1]
