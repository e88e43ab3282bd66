"""Magnitudes over layers, and the whole stream at one layer: the two pictures of arXiv 2402.17762 (figures 1 and 4)."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from megastab.analysis import arguments as shared
from megastab.analysis.output import Table, new_figure, plain_log, whole_numbers
from megastab.analysis.stream import Layer, look
from megastab.analysis.subject import Subject
from megastab.config.errors import UserError
from megastab.telemetry.moments import MASSIVE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = ("largest", "second", "third")
COLORS = ("#B2182B", "#F58518", "#B79A20")
MEDIAN_COLOR = "#4C78A8"
POINTS = 160  # of a token's curve; more cannot be told apart in the picture
STANDS_OUT = 10.0  # a token whose largest magnitude is so many times that of most tokens is drawn in red


class Surface(NamedTuple):
    """The first tokens of one window after one layer."""

    layer: int
    size_SD: Tensor
    """[S, D] fp32 magnitudes on the CPU."""
    tokens: list[str]


def surface(subject: Subject, window_S: Tensor, layer: int, tokens: int) -> Surface:
    """Magnitudes after ``layer`` at the first ``tokens`` positions of a window."""
    kept: list[Tensor] = []

    def see(_: int, hidden_BSD: Tensor) -> None:
        kept.append(hidden_BSD[0, :tokens].detach().float().abs().cpu())

    with subject.watch(subject.blocks[layer : layer + 1], see):
        subject.run(window_S[None])
    return Surface(layer, kept[0], [subject.token_text(int(token)) for token in window_S[:tokens]])


def _run(arguments: argparse.Namespace) -> None:
    subject, output = shared.subject_of(arguments), shared.output_of(arguments)
    asked, last = arguments.layer, len(subject.blocks) - 1
    if asked is not None and not 0 <= asked <= last:
        raise UserError(f"--layer {asked}: the model has layers 0 to {last}")
    settings = shared.settings_of(arguments, subject)
    windows = {shared.setting_name(bos): shared.windows_of(arguments, subject, bos) for bos in settings}
    found = {name: look(subject, windows_NS, arguments.batch, name) for name, windows_NS in windows.items()}
    layer = max(range(len(subject.blocks)), key=lambda i: max(layers[i].seen.largest for layers in found.values()))
    tables = [_table(subject, name, layers) for name, layers in found.items()]
    output.write("top", {"model": subject.name, **{name: _data(layers) for name, layers in found.items()}}, tables)
    if output.folder is not None:
        output.picture("top_layers", draw_layers(subject.name, found))
        surfaces = {
            name: surface(subject, windows_NS[0], asked if asked is not None else layer, arguments.tokens)
            for name, windows_NS in windows.items()
        }
        output.picture("top_magnitudes", draw_surfaces(subject.name, surfaces))


def _table(subject: Subject, name: str, layers: list[Layer]) -> Table:
    ratios = [layer.mean_top[0] / layer.mean_median if layer.mean_median else None for layer in layers]
    rows = [[i, *layer.mean_top, layer.mean_median, ratios[i]] for i, layer in enumerate(layers)]
    title = f"{subject.name}, {name}: magnitudes after each layer, mean over {layers[0].num_windows} windows"
    return Table(title, ["layer", *NAMES, "median", "largest / median"], rows)


def _data(layers: list[Layer]) -> list[dict[str, object]]:
    return [{"layer": i, "top": layer.mean_top, "median": layer.mean_median} for i, layer in enumerate(layers)]


# -- pictures ----------------------------------------------------------------------------------------------------------


def draw_layers(name: str, found: dict[str, list[Layer]]) -> Figure:
    """A panel for each setting: the three largest magnitudes and the median over layers, on a log scale."""
    figure = new_figure(1.0 + 4.6 * len(found), 3.8)
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (setting, layers) in zip(panels, found.items(), strict=True):
        _draw_curves(axes, layers)
        axes.set_title(setting, fontsize=10)
    panels[0].set_ylabel("magnitude, mean over windows")
    panels[-1].legend(fontsize=8, framealpha=0.9)
    figure.suptitle(f"{name}: largest magnitudes of the residual stream", fontsize=11)
    return figure


def _draw_curves(axes: Axes, layers: list[Layer]) -> None:
    places = range(len(layers))
    style: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.4}
    for i, (name, color) in enumerate(zip(NAMES, COLORS, strict=True)):
        axes.plot(places, [layer.mean_top[i] for layer in layers], color=color, label=name, **style)
    axes.plot(places, [layer.mean_median for layer in layers], color=MEDIAN_COLOR, label="median", **style)
    axes.set_yscale("log")
    if max(layer.mean_top[0] for layer in layers) > MASSIVE / 10:
        axes.axhline(MASSIVE, color="#7F7F7F", linewidth=0.8, linestyle=":", label=f"{MASSIVE:g}, half of the rule")
    whole_numbers(axes.xaxis)
    plain_log(axes.yaxis)
    axes.set_xlabel("after layer")
    axes.grid(alpha=0.25)


def draw_surfaces(name: str, surfaces: dict[str, Surface]) -> Figure:
    """Magnitude over tokens and channels, a line for each token."""
    layer = next(iter(surfaces.values())).layer
    figure = new_figure(6.2 * len(surfaces), 5.4)
    for i, (setting, seen) in enumerate(surfaces.items()):
        axes = figure.add_subplot(1, len(surfaces), i + 1, projection="3d")
        _draw_surface(axes, seen)
        axes.set_title(setting, fontsize=10)
    figure.suptitle(f"{name}: |residual stream| after layer {layer}, first window", fontsize=11)
    return figure


def _draw_surface(axes: Any, seen: Surface) -> None:
    """A token's channels are a filled curve, the front ones drawn last, so that what is behind is hidden."""
    from mpl_toolkits.mplot3d.art3d import Poly3DCollection

    tokens, channels = seen.size_SD.shape
    limit, top_S = float(seen.size_SD.max()), seen.size_SD.amax(1)
    for position in reversed(range(tokens)):
        color = COLORS[0] if float(top_S[position]) >= STANDS_OUT * float(top_S.median()) else MEDIAN_COLOR
        curve = [(channel, position, size) for channel, size in _peaks(seen.size_SD[position])]
        outline = [(0, position, 0.0), *curve, (channels - 1, position, 0.0)]
        axes.add_collection3d(Poly3DCollection([outline], facecolor="white", edgecolor=color, linewidth=0.8, alpha=0.9))
    axes.set(xlim=(0, channels - 1), ylim=(-0.5, tokens - 0.5), zlim=(0, limit), xlabel="channel")
    axes.set_xticks(_apart(sorted(seen.size_SD.amax(0).topk(min(3, channels)).indices.tolist()), 0.07 * channels))
    axes.set_yticks(range(tokens), seen.tokens, fontsize=7, ha="left", va="center")
    axes.tick_params(axis="y", pad=-3)
    axes.tick_params(axis="z", labelsize=7)
    axes.view_init(elev=24, azim=-60)


def _peaks(size_D: Tensor) -> list[tuple[int, float]]:
    """At most ``POINTS`` (channel, size): of neighbouring channels the largest, so that no peak is lost."""
    group = -(-len(size_D) // POINTS)
    starts = range(0, len(size_D), group)
    places = [start + int(size_D[start : start + group].argmax()) for start in starts]
    return [(place, float(size_D[place])) for place in places]


def _apart(ticks: list[int], distance: float) -> list[int]:
    """Without those that would be written over the one before."""
    kept: list[int] = []
    for tick in ticks:
        kept += [tick] if not kept or tick - kept[-1] > distance else []
    return kept


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model_arguments(parser)
    shared.add_text_arguments(parser)
    shared.add_bos_argument(parser)
    parser.add_argument("--layer", type=int, metavar="L", help="of the 3-D picture, from 0 (default: where the largest entry is)")
    parser.add_argument("--tokens", type=int, default=14, metavar="T", help="of the 3-D picture (default: %(default)s)")
    shared.add_output_argument(parser)


ANALYSIS = shared.Analysis("top", "largest magnitudes over layers, and a 3-D picture of one layer", _add_arguments, _run)
