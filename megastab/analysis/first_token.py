"""How much attention goes to the first token (arXiv 2410.17174, section 3): share of (layer, head, query) whose largest weight is on key 0,
query 0 left out, and the mean weight there, beside what uniform attention would give it."""

from __future__ import annotations

import argparse
from typing import Any

from megastab.analysis import arguments as shared
from megastab.analysis.attention_sums import AttentionSums, attention_means, uniform_first_mass
from megastab.analysis.output import Table
from megastab.analysis.subject import Subject


def _run(arguments: argparse.Namespace) -> None:
    subject, output = shared.subject_of(arguments, is_eager=True), shared.output_of(arguments)
    found = {}
    for bos in shared.settings_of(arguments, subject):
        name = shared.setting_name(bos)
        found[name] = attention_means(subject, shared.windows_of(arguments, subject, bos), arguments.batch, name)
    tables = [_whole(subject, found), *(_layers(subject, name, seen) for name, seen in found.items())]
    output.write("first_token", {"model": subject.name, **{name: _data(seen) for name, seen in found.items()}}, tables)


def overall(seen: AttentionSums) -> dict[str, float | None]:
    """Means over layers and heads; ``uniform`` is what equal attention to all that is seen would give key 0, ``sink`` None without one."""
    uniform = uniform_first_mass(seen.seq, seen.has_sink)
    mass = float(seen.first_mass_LQ.mean())
    share, sink = float(seen.first_wins_LQ.mean()), float(seen.sink_LQ.mean()) if seen.has_sink else None
    return {"share": share, "mass": mass, "uniform": uniform, "excess": mass - uniform, "sink": sink}


ROWS = {
    "share": "queries whose largest weight is on key 0",
    "mass": "mean weight on key 0",
    "uniform": "the same of uniform attention",
    "excess": "difference",
    "sink": "mean weight on a sink that is no key",
}


def _whole(subject: Subject, found: dict[str, AttentionSums]) -> Table:
    columns = [overall(seen) for seen in found.values()]
    rows = [[text, *(column[key] for column in columns)] for key, text in ROWS.items()]
    seq = next(iter(found.values())).seq
    return Table(f"{subject.name}: attention to the first token, windows of {seq}", ["mean over layers and heads", *found], rows)


def _layers(subject: Subject, name: str, seen: AttentionSums) -> Table:
    rows = []
    for layer in range(seen.first_mass_LQ.shape[0]):
        share_Q, mass_Q = seen.first_wins_LQ[layer], seen.first_mass_LQ[layer]
        head = int(mass_Q.argmax())
        sink = float(seen.sink_LQ[layer].mean()) if seen.has_sink else None
        rows.append([layer, float(share_Q.mean()), float(mass_Q.mean()), head, float(mass_Q[head]), sink])
    columns = ["layer", "share of queries", "weight on key 0", "most in head", "its weight", "on the sink"]
    return Table(f"By layer, {name}", columns, rows)


def _data(seen: AttentionSums) -> dict[str, Any]:
    heads = {"share": seen.first_wins_LQ, "mass": seen.first_mass_LQ, "sink": seen.sink_LQ}
    return {**overall(seen), "seq_len": seen.seq, "by_layer_and_head": {key: value.tolist() for key, value in heads.items()}}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model_arguments(parser)
    shared.add_text_arguments(parser, seq_len=256)  # the papers' length; maps are S x S a head
    shared.add_bos_argument(parser)
    shared.add_output_argument(parser)


ANALYSIS = shared.Analysis("first-token", "how much attention goes to the first token", _add_arguments, _run)
