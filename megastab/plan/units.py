"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence


def size(number: float) -> str:
    """Bytes: ``3.25 GiB``, ``12.0 MiB``, ``0``."""
    if not number:
        return "0"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(number) < 1024 or unit == "TiB":
            break
        number /= 1024
    return f"{number:.0f} {unit}" if unit == "B" else f"{_three(number)} {unit}"


def amount(number: float) -> str:
    """A count: ``6.74 B``, ``124 M``, ``950``."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{_three(number / limit)} {unit}"
    return f"{number:g}"


def flops(number: float) -> str:
    """Floating-point operations: ``4.21e+16 = 42.1 PFLOP``."""
    for limit, unit in ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if number >= limit:
            return f"{_three(number / limit)} {unit}FLOP"
    return f"{_three(number / 1e6)} MFLOP"


def _three(number: float) -> str:
    """At least three digits."""
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.1f}" if abs(number) >= 10 else f"{number:.2f}"


def table(rows: list[list[str]], indent: str = "  ") -> list[str]:
    """Rows of cells as aligned lines: the first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        lines.append(indent + "  ".join(cells).rstrip())
    return lines


def seconds(value: float) -> str:
    """``3.25 s``, ``12 ms``, ``0``."""
    if not value:
        return "0"
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.2g} us"


def named(groups: Sequence[Sequence[int]]) -> list[str]:
    """Heads of columns that each stand for equal stages."""
    return [f"stage {group[0]}" if len(group) == 1 else f"stages {group[0]}-{group[-1]}" for group in groups]


def alike(values: Sequence[object]) -> list[list[int]]:
    """Neighbours that are equal, together."""
    groups: list[list[int]] = []
    for i, value in enumerate(values):
        if groups and values[groups[-1][0]] == value:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
