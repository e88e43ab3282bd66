"""A measured figure and the table of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One figure. ``raw`` is what it was formed from, for ``--json``."""

    figure: str
    case: str
    value: float | None
    """None where it could not be measured; ``detail`` says why."""
    unit: str = "x"
    bound: float | None = None
    is_floor: bool = True
    """Whether the value must reach the bound (a speed) or stay below it (a time, a share, a size)."""
    detail: str = ""
    raw: dict[str, list[float]] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """``ok`` or ``MISSED``; ``failed`` where nothing was measured; empty where nothing is promised."""
        if self.value is None:
            return "failed"
        if self.bound is None:
            return ""
        return "ok" if (self.value >= self.bound if self.is_floor else self.value <= self.bound) else "MISSED"

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        value = "-" if self.value is None else f"{self.value:.3f} {self.unit}"
        bound = "" if self.bound is None else f"{'>=' if self.is_floor else '<='} {self.bound:g}"
        return self.figure, self.case, value, bound, self.verdict, self.detail


def table(rows: Sequence[Row]) -> str:
    """Aligned columns, the free text last."""
    lines = [("figure", "case", "value", "promised", "", "detail"), *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n".join(_aligned(lines, widths))


def _aligned(lines: Sequence[tuple[str, ...]], widths: Sequence[int]) -> Iterator[str]:
    for line in lines:
        columns = [text.rjust(width) if i == 2 else text.ljust(width) for i, (text, width) in enumerate(zip(line[:5], widths, strict=True))]
        yield "  ".join([*columns, line[5]]).rstrip()
