"""A stretch of one matrix inside the flat tensor OrthoAdam is stepped on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from megastab.optim.rotation import Rotation

RotationFor = Callable[[str, int], Rotation]


@dataclass(frozen=True)
class Segment:
    """Neighbouring elements of one matrix (or vector) inside a flat tensor."""

    name: str
    offset: int
    """In the flat tensor."""
    first: int
    """In the whole matrix, over all ranks."""
    length: int
    width: int = 0
    """Of a row; 0 for what is not rotated."""
    decays: bool = True
    left: Rotation | None = None
    """Of a whole matrix whose columns are rotated too."""
    turns_rows: bool = True
    """Whether the rows of such a matrix are."""

    @property
    def stop(self) -> int:
        """One past the last element, in the whole matrix."""
        return self.first + self.length

    def cut(self, first: int, stop: int) -> Segment:
        """The part between two elements of the whole matrix."""
        return replace(self, offset=self.offset + first - self.first, first=first, length=stop - first)

    @property
    def num_whole(self) -> int:
        """Elements of the whole matrix, where its columns are rotated too."""
        assert self.left is not None
        return self.left.width * self.width


def right_of(segment: Segment, rotation_for: RotationFor) -> Rotation | None:
    """What turns the rows of a whole matrix; None where they are left alone."""
    return rotation_for(segment.name, segment.width) if segment.turns_rows else None
