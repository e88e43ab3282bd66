"""A plan on a cluster, and a search over layouts, as pages of text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from megastab.config.config import Config
from megastab.plan.budget import RESERVE, Budget, budget
from megastab.plan.cluster import Cluster
from megastab.plan.offload_text import offload_table
from megastab.plan.parameters import Stage
from megastab.plan.predict import LATENCY, Prediction, is_inside_node
from megastab.plan.recompute import cluster_policy_table
from megastab.plan.search import Candidate, Found
from megastab.plan.traffic import traffic
from megastab.plan.transfer import ranks_of
from megastab.plan.units import alike, amount, named, seconds, size, table

SHOWN = 10


def on_cluster(config: Config, cluster: Cluster, stages: Sequence[Stage], predicted: Prediction) -> str:
    """Memory against what a GPU has, bytes by group, and the time of a step."""
    lines = [describe(cluster), "", f"Memory of one rank, by category and stage; {100 * RESERVE:.0f} % of a GPU kept in reserve"]
    lines += [*_budgets(config, cluster, stages), *offload_table(config, cluster, stages), "", "Payload of one rank in one step, by stage"]
    lines += [*_traffic(config, cluster, stages), "", *_time(config, predicted)]
    lines += ["", "By megastab.parallel.recompute, everything else as it is", *cluster_policy_table(config, cluster, stages), ""]
    lines += assumptions(cluster)
    return "\n".join(lines)


def describe(cluster: Cluster) -> str:
    """The cluster in a line."""
    peaks = ", ".join(f"{name} {peak:g}" for name, peak in cluster.peak_tflops.items())
    return (
        f"Cluster: {cluster.nodes} x {cluster.gpus_per_node} GPUs of {cluster.memory_gb:.4g} GiB; TFLOP/s {peaks}; "
        f"{cluster.intra_gbps:g} Gb/s inside a node, {cluster.inter_gbps:g} between"
    )


def assumptions(cluster: Cluster) -> list[str]:
    """What a prediction rests on."""
    said = (
        f"A prediction, not a measurement. Assumed: {100 * cluster.efficiency:g} % of the peak outside communication; 1F1B at the pace of "
        f"the slowest stage; rings at full link speed and {LATENCY * 1e6:g} us a doubling of ranks; tensor-parallel, "
        "context-parallel, pipeline and ZeRO 0-2 "
        "traffic exposed, ZeRO 3's hidden as far as the products last. Not in it: the update, data, checkpoints, stragglers, contention."
    )
    return textwrap.wrap(said, 120)


def _budgets(config: Config, cluster: Cluster, stages: Sequence[Stage]) -> list[str]:
    budgets = [budget(config, stage, cluster) for stage in stages]
    groups = alike(budgets)
    shown = [budgets[group[0]] for group in groups]
    names = dict.fromkeys(name for one in shown for name in one.categories)
    rows = [["", *named(groups)]]
    rows += [[name, *(size(one.categories.get(name, 0)) for one in shown)] for name in names]
    rows += [["in all", *(size(one.total) for one in shown)], ["available", *(size(one.available) for one in shown)]]
    return table([*rows, ["", *("fits" if one.fits else "DOES NOT FIT" for one in shown)]])


def _traffic(config: Config, cluster: Cluster, stages: Sequence[Stage]) -> list[str]:
    sent = [traffic(config, stage) for stage in stages]
    groups = alike(sent)
    if not any(sent):
        return ["  nothing: one rank"]
    rows = [["", "collective", "group", "ranks", "link", *named(groups)]]
    keys = dict.fromkeys((t.what, t.kind, t.group) for transfers in sent for t in transfers)
    for what, kind, group in keys:
        link = "node" if is_inside_node(config, cluster, group) else "network"
        held = [[t for t in sent[own[0]] if (t.what, t.kind, t.group) == (what, kind, group)] for own in groups]
        cells = [f"{size(sum(t.bytes for t in found))} in {sum(t.calls for t in found)}" if found else "-" for found in held]
        rows.append([what, kind.replace("_", "-"), group, str(ranks_of(config, group)), link, *cells])
    return table(rows)


def _time(config: Config, predicted: Prediction) -> list[str]:
    rows = [["compute", seconds(predicted.compute)], ["tensor-parallel traffic", seconds(predicted.tensor)]]
    rows += [["context-parallel traffic", seconds(predicted.context)]] if config.layout.context > 1 else []
    rows += [["pipeline traffic", seconds(predicted.pipeline)], ["pipeline bubble", seconds(predicted.bubble)]]
    rows += [["data-parallel traffic", seconds(predicted.data)]]
    rows += [["waiting for activations", seconds(predicted.offload)]] if predicted.offload else []
    rows += [["step", seconds(predicted.seconds)]]
    rate = amount(config.tokens_per_step / predicted.seconds)
    return ["Predicted time of a step", *table([*rows, ["MFU", f"{100 * predicted.mfu:.1f} %"], ["tokens a second", rate]])]


def found_page(found: Found, cluster: Cluster) -> str:
    """The fastest layouts, and why the others are out."""
    rows = [["", "tp", "cp", "pp", "dp", "ZeRO", "recompute", "micro", "memory", "step", "MFU"]]
    rows += [[f"{i}.", *cells(candidate)] for i, candidate in enumerate(found.fitting[:SHOWN], start=1)]
    lines = [describe(cluster), "", f"{len(found.fitting)} layouts fit; the fastest by prediction", *table(rows), ""]
    if found.reasons:
        lines += ["The others", *table([[reason, str(count)] for reason, count in found.reasons.most_common()]), ""]
    lines += ["The first, as overrides", f"  {found.fitting[0].overrides}", "", *assumptions(cluster)]
    return "\n".join(lines)


def cells(candidate: Candidate) -> list[str]:
    """A row of a table of layouts, from tp on."""
    config, layout = candidate.config, candidate.config.layout
    tensor = f"{layout.tensor} sp" if config.megastab.parallel.sequence else str(layout.tensor)
    cut = [tensor, str(layout.context), str(layout.pipeline), str(layout.data), str(config.zero_stage), config.megastab.parallel.recompute]
    predicted = candidate.prediction
    return [*cut, str(config.micro_batch), size(candidate.budget.total), seconds(predicted.seconds), f"{100 * predicted.mfu:.1f} %"]


def in_words(config: Config) -> str:
    """A layout in a phrase."""
    layout, parallel = config.layout, config.megastab.parallel
    shared = f"context {layout.context} x " if layout.context > 1 else ""
    return (
        f"tensor {layout.tensor} x {shared}pipeline {layout.pipeline} x data {layout.data}, ZeRO {config.zero_stage}, recompute "
        f"{parallel.recompute}, micro-batch {config.micro_batch}"
    )


def shortage(config: Config, one: Budget) -> str:
    """What is too large in the layout that comes closest."""
    return (
        f"it fits nowhere: the closest is {in_words(config)}, with {size(one.total)} of {size(one.available)} a GPU, most of it "
        f"{one.largest} ({size(one.categories[one.largest])})"
    )
