"""The page's ranks, from ``rank_times.jsonl``: each one's own seconds over the median of its pipeline stage, window by window as a picture,
and those that were slow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megastab.report.history import History, number
from megastab.report.markup import counted, figure, note, picture_tag, section, table, text
from megastab.telemetry.straggler import Pace, paces

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ROWS, MOST_COLUMNS = 256, 400  # beyond these a cell holds the largest of several ranks or windows: a row is 3 pixels high
SHOWN_RANKS, NAMED_RANKS = 12, 6
LEAST, MOST = 0.7, 1.3  # where the colours end, so that they mean the same in every run
MEANING = (
    "A rank's own seconds are a step's less those it stood in collectives, the median over a window of steps; the colour is what they are "
    "over the median of the rank's pipeline stage (dotted lines lie between stages). A slow link between ranks does not show, nor does a "
    "rank alone in its stage."
)


@dataclass(frozen=True)
class Times:
    """The windows of one layout."""

    steps: list[int]
    """The last step of each."""
    over: float
    """From this share on a rank is slow."""
    paces: list[dict[int, Pace]]
    """Of each window, by rank; those with peers only."""
    stages: list[int]
    """By rank."""

    @property
    def slow(self) -> dict[int, list[int]]:
        """By rank, the windows it was slow in; the ones with most of them first."""
        found: dict[int, list[int]] = {}
        for column, window in enumerate(self.paces):
            for rank, pace in window.items():
                if pace.ratio >= 1 + self.over:
                    found.setdefault(rank, []).append(column)
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))

    def grid(self) -> list[list[float]]:
        """Own over median, [ranks, windows]; NaN where it is not known."""
        return [[window[rank].ratio if rank in window else math.nan for window in self.paces] for rank in range(len(self.stages))]


def times_of(history: History) -> Times | None:
    """The windows since ranks or stages last changed; None where there are none, or no rank has peers."""
    windows = [window for window in history.rank_times if _is_whole(window)]
    last = next((i for i in range(len(windows), 0, -1) if windows[i - 1]["stages"] != windows[-1]["stages"]), 0)
    windows = windows[last:]
    found = [{pace.rank: pace for pace in paces(_values(w, "own_seconds"), _values(w, "data_seconds"), w["stages"])} for w in windows]
    if not any(found):
        return None
    over = number(windows[-1].get("over"))
    return Times([w["step"] for w in windows], over if math.isfinite(over) else math.inf, found, windows[-1]["stages"])


def _values(window: dict[str, Any], key: str) -> list[float]:
    return [number(value) for value in window[key]]


def _is_whole(window: dict[str, Any]) -> bool:
    """Whether a line says of every rank what it should."""
    columns = [window.get(key) for key in ("own_seconds", "data_seconds", "stages")]
    lengths = {len(column) if isinstance(column, list) else 0 for column in columns}
    return len(lengths) == 1 and 0 not in lengths and all(isinstance(stage, int) for stage in window["stages"])


def ranks(history: History) -> str:
    """The section; empty where ranks were not compared."""
    times = times_of(history)
    if times is None:
        return ""
    picture = picture_tag(figure_of_ranks(times), "own seconds of every rank over the median of its stage, window by window")
    return section("Ranks", f"<p>{_words(times)}</p>", picture, note(MEANING), _slow_ranks(history, times))


def _words(times: Times) -> str:
    slow, window = times.slow, times.paces[-1]
    words = f"{counted(len(times.stages), 'rank')}, {counted(len(times.steps), 'window')} up to step {times.steps[-1]}"
    if math.isfinite(times.over):
        words += f"; {counted(len(slow), 'rank') if slow else 'no rank'} at least {100 * times.over:.3g} % over the median of the stage"
    if not window:
        return f"{words}."
    worst = max(window.values(), key=lambda pace: pace.ratio)
    return f"{words}. In the last window the slowest was rank {worst.rank}, at {figure(worst.ratio)} times the median."


def _slow_ranks(history: History, times: Times) -> str:
    hosts = {event.get("rank"): str(event.get("host", "")) for event in history.events_of("straggler")}
    slow, rows = times.slow, []
    for rank, windows in list(slow.items())[:SHOWN_RANKS]:
        at = max(windows, key=lambda column: times.paces[column][rank].ratio)
        pace = times.paces[at][rank]
        where = [str(rank), text(hosts.get(rank, "")) or "&ndash;", str(times.stages[rank]), f"{len(windows)} of {len(times.steps)}"]
        rows.append([*where, figure(pace.ratio), str(times.steps[at]), figure(pace.own), figure(pace.data), pace.cause])
    if not rows:
        return ""
    head = ("rank", "host", "stage", "windows it was slow", "worst", "at step", "own seconds", "of these data", "slow at")
    more = note(f"and {len(slow) - len(rows)} more, slow in no more windows.") if len(slow) > len(rows) else ""
    return table(head, rows, numbers=("rank", "stage", "windows it was slow", "worst", "at step", "own seconds", "of these data")) + more


def figure_of_ranks(times: Times) -> Figure:
    """Ranks over windows; a line between two stages, and the slow ones named on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, and no global state of pyplot's
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    per_row, per_column = -(-len(times.stages) // MOST_ROWS), -(-len(times.steps) // MOST_COLUMNS)
    cells = _largest_of(times.grid(), per_row, per_column)
    picture = Figure(figsize=(10, min(1.5 + 0.25 * len(cells), 7.0)), dpi=120, layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.subplots()
    axes.set_facecolor("#DDDDDD")
    colours = TwoSlopeNorm(1.0, LEAST, MOST)
    drawn = axes.imshow(cells, aspect="auto", origin="lower", cmap="bwr", norm=colours, interpolation="nearest")
    bar = picture.colorbar(drawn, ax=axes, extend="both", ticks=[LEAST, 1.0, MOST], pad=0.08, aspect=min(8 + len(cells), 40))
    bar.set_label("own over median", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    _mark(axes, times, per_row, per_column)
    return picture


def _largest_of(grid: list[list[float]], per_row: int, per_column: int) -> list[list[float]]:
    cells = []
    for top in range(0, len(grid), per_row):
        row = []
        for left in range(0, len(grid[0]), per_column):
            held = [value for line in grid[top : top + per_row] for value in line[left : left + per_column] if math.isfinite(value)]
            row.append(max(held, default=math.nan))
        cells.append(row)
    return cells


def _mark(axes: Axes, times: Times, per_row: int, per_column: int) -> None:
    """Steps below, ranks on the left, the edges of stages, and on the right those that were slow most often."""
    from matplotlib.ticker import MaxNLocator

    steps, stages = times.steps, times.stages
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.xaxis.set_major_formatter(lambda at, _: str(steps[min(int(at) * per_column, len(steps) - 1)]) if at >= 0 else "")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.yaxis.set_major_formatter(lambda at, _: str(int(at) * per_row) if 0 <= int(at) * per_row < len(stages) else "")
    axes.set_xlabel("step")
    axes.set_ylabel("rank")
    for rank in range(1, len(stages)):
        if stages[rank] != stages[rank - 1]:
            axes.axhline(rank / per_row - 0.5, color="#777777", linewidth=0.6, linestyle=":")
    right = axes.secondary_yaxis("right")
    right.set_yticks(*_apart(list(times.slow), per_row, len(stages)))
    right.tick_params(labelsize=8, colors="#B2182B")


def _apart(slow: list[int], per_row: int, ranks: int) -> tuple[list[float], list[str]]:
    """Rows and names of the first of ``slow`` that do not stand in each other's way."""
    named: list[int] = []
    for rank in slow:
        if len(named) < NAMED_RANKS and all(abs(rank - other) > 0.04 * ranks for other in named):
            named.append(rank)
    return [rank // per_row for rank in named], [f"rank {rank}" for rank in named]
