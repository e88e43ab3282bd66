"""What massive activations do: perplexity after they are set to zero, or to their mean, where they first appear (arXiv 2402.17762,
section 3; 2503.22329, section 4).

At the first layer that has any, the entries of each window that pass the rule, in channels that calibration windows knew, are replaced,
and the rest of the network runs on what is left. A mean is that of the signed calibration values of the same channel, of first tokens
and of others apart. Entries of first tokens and of others are replaced apart and together. A model that needs them collapses with zero
and not with the mean: they act as constant biases.

Differs: the released code of 2503.22329 installs the mean at the first massive layer whatever layer is asked; here there is one layer.
"""

from __future__ import annotations

import argparse
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from megastab.analysis import arguments as shared
from megastab.analysis.output import Table
from megastab.analysis.perplexity import perplexity
from megastab.analysis.stream import Layer, first_massive, look, massive_entries, median_of
from megastab.analysis.subject import Subject
from megastab.config.errors import UserError

Which = Literal["first tokens", "other tokens", "all"]
Value = Literal["zero", "mean"]
Means = dict[tuple[int, bool], float]
"""(channel, is it the first position) -> what calibration windows had there."""


class Effect(NamedTuple):
    """One intervention."""

    which: Which
    value: Value
    perplexity: float
    num_entries: int
    """Replaced, over all windows."""


def means_of(layer: Layer) -> Means:
    """From the massive entries of calibration windows, over all tokens of a channel."""
    totals: dict[tuple[int, bool], list[float]] = {}
    for spot in layer.spots:
        total = totals.setdefault((spot.channel, spot.is_first), [0.0, 0.0])
        total[0] += spot.mean * spot.num_entries
        total[1] += spot.num_entries
    return {place: total / number for place, (total, number) in totals.items()}


class Replacement:
    """Puts zero or the mean in place of massive entries, and counts them."""

    def __init__(self, means: Means, which: Which, value: Value):
        self.means, self.which, self.value, self.num_entries = means, which, value, 0

    def see(self, _: int, hidden_BSD: Tensor) -> Tensor | None:
        """What :meth:`Subject.watch` calls at the layer; None where there is nothing to replace."""
        places = [(b, *place) for b, hidden_SD in enumerate(hidden_BSD) for place in self._places(hidden_SD)]
        if not places:
            return None
        self.num_entries += len(places)
        new = hidden_BSD.clone()
        for b, position, channel in places:
            new[b, position, channel] = self.means[channel, position == 0] if self.value == "mean" else 0.0
        return new

    def _places(self, hidden_SD: Tensor) -> list[tuple[int, int]]:
        found = [(int(position), int(channel)) for _, position, channel in massive_entries(hidden_SD, median_of(hidden_SD))]
        return [(p, c) for p, c in found if (c, p == 0) in self.means and self.which in ("all", _kind(p))]


def _kind(position: int) -> Which:
    return "other tokens" if position else "first tokens"


def effects(subject: Subject, layer: int, means: Means, windows_NS: Tensor, batch: int, label: str) -> list[Effect]:
    """Every kind of entries that calibration knew, with zero and with the mean."""
    known: set[Which] = {"first tokens" if is_first else "other tokens" for _, is_first in means}
    kinds = [which for which in get_args(Which) if which in known or (which == "all" and len(known) > 1)]
    found = []
    for which in kinds:
        for value in get_args(Value):
            replacement = Replacement(means, which, value)
            with subject.watch(subject.blocks[layer : layer + 1], replacement.see):
                after = perplexity(subject, windows_NS, batch, f"{label}, {which} to {value}")
            found.append(Effect(which, value, after, replacement.num_entries))
    return found


class Trial(NamedTuple):
    """One setting."""

    layer: int | None
    """The first with massive activations; None: there are none, and nothing to replace."""
    means: Means
    before: float
    effects: list[Effect]


def intervene(subject: Subject, windows_NS: Tensor, num_calibration: int, batch: int, label: str) -> Trial:
    """Calibrate on the first ``num_calibration`` windows and measure on the rest."""
    if not 0 < num_calibration < windows_NS.shape[0]:
        raise UserError(f"--calibration {num_calibration} of {windows_NS.shape[0]} windows: must leave some to measure on")
    layers = look(subject, windows_NS[:num_calibration], batch, f"{label}, calibration")
    measured_NS = windows_NS[num_calibration:]
    before = perplexity(subject, measured_NS, batch, f"{label}, untouched")
    layer = first_massive(layers)
    if layer is None:
        return Trial(None, {}, before, [])
    means = means_of(layers[layer])
    return Trial(layer, means, before, effects(subject, layer, means, measured_NS, batch, label))


def _run(arguments: argparse.Namespace) -> None:
    subject, output = shared.subject_of(arguments), shared.output_of(arguments)
    measured, arguments.windows = arguments.windows, arguments.windows + arguments.calibration
    trials = {}
    for bos in shared.settings_of(arguments, subject):
        name = shared.setting_name(bos)
        trials[name] = intervene(subject, shared.windows_of(arguments, subject, bos), arguments.calibration, arguments.batch, name)
    tables = [_perplexities(subject, trials, measured)]
    tables += [_values(name, trial) for name, trial in trials.items() if trial.layer is not None]
    output.write("intervene", {"model": subject.name, **{name: _data(trial) for name, trial in trials.items()}}, tables)


def _perplexities(subject: Subject, trials: dict[str, Trial], windows: int) -> Table:
    rows: list[list[Any]] = []
    for name, trial in trials.items():
        where = "no massive activations" if trial.layer is None else f"after layer {trial.layer}"
        rows.append([name, where, "untouched", "-", trial.before, 0])
        rows += [[name, where, e.which, e.value, e.perplexity, e.num_entries] for e in trial.effects]
    return Table(f"{subject.name}: perplexity on {windows} windows", ["", "where", "replaced", "by", "perplexity", "entries"], rows)


def _values(name: str, trial: Trial) -> Table:
    rows = [[channel, "first" if is_first else "other", mean] for (channel, is_first), mean in sorted(trial.means.items())]
    return Table(f"Means after layer {trial.layer}, {name}", ["channel", "tokens", "mean"], rows)


def _data(trial: Trial) -> dict[str, Any]:
    means = [{"channel": channel, "is_first": is_first, "mean": mean} for (channel, is_first), mean in sorted(trial.means.items())]
    return {"layer": trial.layer, "perplexity": trial.before, "means": means, "effects": trial.effects}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model_arguments(parser)
    shared.add_text_arguments(parser)
    text = "more windows, for the means (default: %(default)s; the papers take 100)"
    parser.add_argument("--calibration", type=int, default=10, metavar="N", help=text)
    shared.add_bos_argument(parser)
    shared.add_output_argument(parser)


ANALYSIS = shared.Analysis("intervene", "perplexity with massive activations set to zero or to their mean", _add_arguments, _run)
