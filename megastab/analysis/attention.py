"""Where attention concentrates: maps averaged over windows, and the most attended positions of every layer and head (arXiv 2402.17762,
section 4; 2503.22329, section 3)."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megastab.analysis import arguments as shared
from megastab.analysis.attention_sums import AttentionSums, attention_means
from megastab.analysis.output import Table, new_figure, whole_numbers
from megastab.analysis.subject import Subject
from megastab.config.errors import UserError

if TYPE_CHECKING:
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

LISTED = 3  # positions told of each layer
PANELS = 12  # maps of the picture


def _run(arguments: argparse.Namespace) -> None:
    subject, output = shared.subject_of(arguments, is_eager=True), shared.output_of(arguments)
    layers = _chosen(arguments.layers, len(subject.blocks))
    found = {}
    for bos in shared.settings_of(arguments, subject):
        name = shared.setting_name(bos)
        found[name] = attention_means(subject, shared.windows_of(arguments, subject, bos), arguments.batch, name)
    tables = [_table(subject, name, seen) for name, seen in found.items()]
    output.write("attention", {"model": subject.name, **{name: _data(seen) for name, seen in found.items()}}, tables)
    if output.folder is not None:
        for name, seen in found.items():
            output.picture(f"attention_{name.replace(' ', '_').lower()}", draw_maps(f"{subject.name}, {name}", seen, layers))
        output.picture("attention_heads", draw_heads(subject.name, found))


def _chosen(asked: list[int] | None, num_layers: int) -> list[int]:
    """Layers of the picture: those asked for, or up to ``PANELS`` spread over all."""
    if asked is None:
        count = min(PANELS, num_layers)
        return sorted({round(i * (num_layers - 1) / max(1, count - 1)) for i in range(count)})
    wrong = [layer for layer in asked if not 0 <= layer < num_layers]
    if wrong:
        raise UserError(f"--layers {wrong[0]}: the model has layers 0 to {num_layers - 1}")
    return asked


def most_attended(columns_S: Tensor, number: int = LISTED) -> list[tuple[int, float]]:
    """(position, share of all attention) of the keys that get most of it."""
    top = columns_S.topk(min(number, len(columns_S)))
    return [(int(place), float(share)) for place, share in zip(top.indices, top.values, strict=True)]


def _table(subject: Subject, name: str, seen: AttentionSums) -> Table:
    rows = []
    for layer, columns_QS in enumerate(seen.columns_LQS):
        most = ", ".join(f"{place} ({share:.1%})" for place, share in most_attended(columns_QS.mean(0)))
        largest = columns_QS.amax(1)
        head = int(largest.argmax())
        told = f"head {head}: {int(columns_QS[head].argmax())} ({float(largest[head]):.1%})"
        rows.append([layer, most, told, float(seen.entropy_LQ[layer].mean())])
    columns = ["layer", "most attended positions (share of all attention)", "most concentrated head", "entropy / uniform's"]
    return Table(f"{subject.name}, {name}: where attention goes, mean over {seen.num_windows} windows of {seen.seq}", columns, rows)


def _data(seen: AttentionSums) -> dict[str, Any]:
    def head(layer: int, q: int) -> dict[str, Any]:
        most = [{"position": place, "share": share} for place, share in most_attended(seen.columns_LQS[layer, q])]
        return {"layer": layer, "head": q, "entropy": float(seen.entropy_LQ[layer, q]), "most_attended": most}

    layers, heads = seen.entropy_LQ.shape
    return {"seq_len": seen.seq, "windows": seen.num_windows, "heads": [head(i, q) for i in range(layers) for q in range(heads)]}


# -- pictures ----------------------------------------------------------------------------------------------------------


def draw_maps(name: str, seen: AttentionSums, layers: list[int]) -> Figure:
    """A map for each of ``layers``, the mean of its heads, of the first positions of a window."""
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure = new_figure(2.3 * columns + 0.8, 2.3 * rows + 0.6)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axes, layer in zip(panels, layers, strict=False):
        map_CC = seen.corner_LQCC[layer].mean(0)
        unseen = torch.ones_like(map_CC, dtype=torch.bool).triu(1)
        axes.imshow(map_CC.masked_fill(unseen, float("nan")).numpy(), norm=_weights(), cmap="viridis")
        axes.set_title(f"layer {layer}", fontsize=9)
        axes.tick_params(labelsize=7)
    for axes in panels[len(layers) :]:
        axes.set_visible(False)
    figure.supxlabel("key position", fontsize=9)
    figure.supylabel("query position", fontsize=9)
    figure.suptitle(f"{name}: attention, mean of heads", fontsize=10)
    figure.colorbar(panels[0].images[0], ax=list(panels), shrink=0.8, label="weight")
    return figure


def _weights() -> Normalize:
    """From 0 to 1, small weights spread out: those of a window are 1/S each."""
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, 0.0, 1.0)


def draw_heads(name: str, found: dict[str, AttentionSums]) -> Figure:
    """Layers by heads: the share of all attention that the most attended key gets."""
    figure = new_figure(1.5 + 4.0 * len(found), 4.0)
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for axes, (setting, seen) in zip(panels, found.items(), strict=True):
        axes.imshow(seen.columns_LQS.amax(-1).numpy(), norm=_weights(), cmap="viridis", aspect="auto", origin="lower")
        axes.set_title(setting, fontsize=10)
        axes.set_xlabel("head")
        whole_numbers(axes.xaxis, axes.yaxis)
    panels[0].set_ylabel("layer")
    figure.colorbar(panels[0].images[0], ax=list(panels), label="share of all attention")
    figure.suptitle(f"{name}: what the most attended key gets", fontsize=11)
    return figure


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model_arguments(parser)
    shared.add_text_arguments(parser, seq_len=256)
    shared.add_bos_argument(parser)
    parser.add_argument("--layers", type=int, nargs="+", metavar="L", help=f"of the picture, from 0 (default: up to {PANELS})")
    shared.add_output_argument(parser)


ANALYSIS = shared.Analysis("attention", "where attention concentrates: maps and most attended positions", _add_arguments, _run)
