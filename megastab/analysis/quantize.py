"""What rounding costs: the perplexity of a trained model with its blocks' matrices, and their inputs, kept in 8 or 4 bits.

The probes of arXiv 2410.17174, section 5.2: int8 weights and inputs at three granularities, and 4-bit weights alone. One scale for all
inputs of a matrix is calibrated on other windows and then fixed, as an integer kernel would have it: taken from each batch anew, it
follows every outlier and hides most of the damage, which is why those rows are shown apart. Scales by token are dynamic by nature.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from megastab.analysis import arguments as shared
from megastab.analysis import probe_arguments as probes
from megastab.analysis.output import Table, new_figure, shown
from megastab.analysis.perplexity import perplexity
from megastab.analysis.quantised import InputRange, Recipe, input_ranges, quantised
from megastab.analysis.subject import Linear, Subject
from megastab.config.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECIPES = (
    Recipe("W8A8 coarse", 8, "absmax", "tensor", "static"),
    Recipe("W8A8 moderate", 8, "absmax", "channel", "static"),
    Recipe("W8A8 fine", 8, "absmax", "channel", "token"),
    Recipe("W8A8 coarse, dynamic", 8, "absmax", "tensor", "batch"),
    Recipe("W8A8 moderate, dynamic", 8, "absmax", "channel", "batch"),
    Recipe("W4 zero-point", 4, "zeropoint", "channel"),
)
SHOWN_RANGES = 8  # matrices in the table of inputs
TOP_CODE = 127
COLORS = {"none": "#E45756", "static": "#4C78A8", "token": "#4C78A8", "batch": "#9ECAE9"}  # pale: what a kernel would not do


class Penalty(NamedTuple):
    """One recipe's cost."""

    recipe: Recipe
    perplexity: float
    penalty: float
    """Perplexity above that of the model as it is."""


class Findings(NamedTuple):
    """Of one model."""

    perplexity: float
    penalties: list[Penalty]
    ranges: list[tuple[Linear, InputRange]]


def probe(subject: Subject, windows: probes.Windows, batch: int = 1, recipes: Sequence[Recipe] = RECIPES) -> Findings:
    """Perplexity as it is and by every recipe; the model is left as it was.

    Raises:
        UserError: the model has no finite perplexity to begin with.
    """
    linears = list(subject.linears())
    plain = finite_perplexity(subject, windows, batch)
    ranges = input_ranges(subject, linears, windows.calibration_CS, batch)
    penalties = []
    for recipe in recipes:
        with quantised(linears, recipe, ranges):
            found = perplexity(subject, windows.evaluated_NS, batch, recipe.name)
        penalties.append(Penalty(recipe, found, found - plain))
    return Findings(plain, penalties, list(zip(linears, ranges, strict=True)))


def finite_perplexity(subject: Subject, windows: probes.Windows, batch: int) -> float:
    """The perplexity penalties are measured from."""
    found = perplexity(subject, windows.evaluated_NS, batch, "as it is")
    if not math.isfinite(found):
        raise UserError(
            f"{subject.name} has perplexity {found} on this text: in fp16 or bf16 try --dtype fp32; else its weights are broken"
        )
    return found


def not_rounded(subject: Subject) -> list[str]:
    """Matrices of the blocks that are no linear layer's, such as the stacked experts of a mixture: the probes leave them as they are."""
    known = {id(linear.weight) for linear in subject.linears()}
    named = ((f"{i}.{name}", parameter) for i, block in enumerate(subject.blocks) for name, parameter in block.named_parameters())
    return [name for name, parameter in named if parameter.ndim > 1 and id(parameter) not in known]


def _weights(recipe: Recipe) -> str:
    kind = "zero-point" if recipe.weight_form == "zeropoint" else "absmax"
    return f"{recipe.weight_bits} bits, {kind}, by {'output channel' if recipe.weight_scales == 'channel' else 'matrix'}"


def _inputs(recipe: Recipe) -> str:
    scale = {"none": "-", "static": "by matrix, static", "batch": "by matrix, each batch anew", "token": "by token"}[recipe.input_scales]
    return scale if recipe.input_scales == "none" else f"{recipe.input_bits} bits, {scale}"


def tables_of(name: str, found: Findings) -> list[Table]:
    """Penalties, and the matrices in whose inputs one outlier leaves ordinary ones the lowest codes."""
    rows = [[p.recipe.name, _weights(p.recipe), _inputs(p.recipe), p.perplexity, p.penalty] for p in found.penalties]
    first = Table(f"{name}: perplexity {shown(found.perplexity)}", ["recipe", "weights", "inputs", "perplexity", "penalty"], rows)
    worst = sorted(found.ranges, key=lambda each: _codes(each[1]))[:SHOWN_RANGES]
    ranges = [[linear.name, float(seen.largest), seen.rms, _codes(seen)] for linear, seen in worst]
    columns = ["matrix", "largest input", "RMS", f"code of an RMS input, of {TOP_CODE}"]
    return [first, Table(f"{name}: inputs hardest to round", columns, ranges)]


def _codes(seen: InputRange) -> float:
    """The code an input of RMS size gets under the static scale, unrounded: where it is below 1, ordinary inputs become 0."""
    top = float(seen.largest)
    return TOP_CODE * seen.rms / top if top else 0.0


def data_of(found: Findings) -> dict[str, Any]:
    """For JSON."""
    return {
        "perplexity": found.perplexity,
        "recipes": [dict(p.recipe._asdict(), perplexity=p.perplexity, penalty=p.penalty) for p in found.penalties],
        "inputs": {linear.name: {"largest": float(seen.largest), "rms": seen.rms} for linear, seen in found.ranges},
    }


def figure_of(name: str, found: Findings) -> Figure:
    """Penalties as bars, each with its number; on a logarithmic axis where they lie far apart."""
    figure = new_figure(8, 0.8 + 0.45 * len(found.penalties))
    axes = figure.subplots()
    finite = [p.penalty if math.isfinite(p.penalty) else 0.0 for p in found.penalties]
    axes.barh([p.recipe.name for p in found.penalties], finite, color=[COLORS[p.recipe.input_scales] for p in found.penalties])
    for row, (p, length) in enumerate(zip(found.penalties, finite, strict=True)):
        axes.annotate(shown(p.penalty), (max(length, 0.0), row), (4, 0), textcoords="offset points", va="center", fontsize=9)
    sizes = sorted(abs(x) for x in finite if x)
    if sizes and sizes[-1] > 100 * (middle := sizes[len(sizes) // 2]):
        axes.set_xscale("symlog", linthresh=10.0 ** math.floor(math.log10(middle)))  # a power of ten: no ticks crowd around 0
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"perplexity above {shown(found.perplexity)}")
    axes.set_title(name, fontsize=10)
    return figure


def _run(arguments: argparse.Namespace) -> None:
    subject = shared.subject_of(arguments)
    windows = probes.evaluated_and_calibration(arguments, subject)
    if left := not_rounded(subject):
        print(f"{subject.name}: not rounded, since they are no linear layer's: {', '.join(left[:3])}{', ...' if len(left) > 3 else ''}")
    found = probe(subject, windows, arguments.batch)
    output = shared.output_of(arguments)
    made = probes.how_evaluated(arguments, subject, windows) | {"not_rounded": left}
    output.write("quantize", made | data_of(found), tables_of(subject.name, found))
    output.picture("quantize", figure_of(subject.name, found))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    probes.add_common_arguments(parser, "the scales of inputs are fixed")


ANALYSIS = shared.Analysis("quantize", "what 8-bit matrices and inputs, or 4-bit matrices, cost in perplexity", _add_arguments, _run)
