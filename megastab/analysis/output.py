"""Where results go: tables on the terminal, and with ``--output DIR`` NAME.json, NAME.md and pictures. What is not finite is null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megastab.config.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


class Table(NamedTuple):
    """Rows under a title."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Output:
    """A folder, made when the first file is written; None prints only."""

    def __init__(self, folder: str | Path | None):
        self.folder = Path(folder) if folder is not None else None

    def write(self, name: str, data: Any, tables: Sequence[Table]) -> None:
        """Print the tables; into the folder go ``name.json`` (``data``) and ``name.md`` (the tables)."""
        text = "\n".join(markdown(table) for table in tables)
        print(text)
        if self.folder is not None:
            self._path(f"{name}.json").write_text(json.dumps(plain(data), indent=2, allow_nan=False) + "\n", encoding="utf-8")
            self._path(f"{name}.md").write_text(text, encoding="utf-8")

    def picture(self, name: str, figure: Figure) -> None:
        """Write ``name.png``, if there is a folder."""
        if self.folder is not None:
            figure.savefig(self._path(f"{name}.png"))
            print(self.folder / f"{name}.png")

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {self.folder}: {error.strerror}; give another folder") from None
        return self.folder / name


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches, without a window and without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def whole_numbers(*axes: Axis) -> None:
    """Ticks at whole numbers: layers, heads and positions."""
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator(nbins="auto", integer=True))


def plain_log(axis: Axis) -> None:
    """A logarithmic axis labelled 3, 10, 300, not 3 x 10^2."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(10.0, subs=(1.0, 3.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def markdown(table: Table) -> str:
    """A table with its title above, columns padded to be read as text too."""
    cells = [list(map(str, table.columns)), *([shown(value) for value in row] for row in table.rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(table.columns))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([f"### {table.title}", "", lines[0], rule, *lines[1:], ""])


def shown(value: Any) -> str:
    """A cell: four significant digits, yes and no, a dash for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def plain(value: Any) -> Any:
    """What JSON can hold; a float that is not finite becomes None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
