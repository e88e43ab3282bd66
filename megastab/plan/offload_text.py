"""What activation offload does to a plan, as text."""

from __future__ import annotations

from collections.abc import Sequence

from megastab.config.config import Config
from megastab.plan.cluster import Cluster
from megastab.plan.offload import Offloaded, offloaded
from megastab.plan.parameters import Stage
from megastab.plan.units import alike, named, size, table

PLACES = {"cpu": "host memory", "ssd": "the disk"}


def offload_table(config: Config, cluster: Cluster, stages: Sequence[Stage]) -> list[str]:
    """One column a stage, equal neighbours together; nothing where activations stay."""
    section = config.megastab.parallel.activation_offload
    if section.kind == "none":
        return []
    place, found = PLACES[section.kind], [offloaded(config, stage, cluster) for stage in stages]
    groups = alike(found)
    shown = [found[group[0]] for group in groups]

    def row(name: str, values: Sequence[str]) -> list[str]:
        return [name, *values]

    rows = [["", *named(groups)]]
    rows += [row("kept of a micro-batch", [size(one.activations.per_micro_batch) for one in shown])]
    rows += [row("may leave", [size(one.movable) for one in shown])]
    rows += [row("leaves", [f"{size(one.activations.away)}, {100 * one.share:.0f} %" for one in shown])]
    rows += [row("on its way, still or again here", [size(one.activations.moving) for one in shown])]
    rows += [row(f"in {place} at once", [size(one.activations.outside) for one in shown])]
    rows += [row(f"to {place} in a step, and back", [size(one.activations.away * config.accumulation) for one in shown])]
    rows += [row("bandwidth each way", [_rate(one.rate) for one in shown])]
    rows += [row("that all of it would need", [_rate(one.needed) for one in shown])]
    head = f"Activations of one rank that wait in {place} (amount: {section.amount}), by stage"
    return ["", head, *table(rows), *_of_a_node(place, cluster, found)]


def _of_a_node(place: str, cluster: Cluster, found: Sequence[Offloaded]) -> list[str]:
    most = max(one.activations.outside for one in found)
    return [f"  {cluster.gpus_per_node} ranks of a node have up to {size(most * cluster.gpus_per_node)} in {place}"] if most else []


def _rate(value: float) -> str:
    if value == float("inf"):
        return "more than any"
    return f"{value / 1e9:.3g} GB/s" if value else "-"


def offload_line(config: Config) -> str:
    """For a plan without a cluster, which knows no bandwidth; empty where activations stay."""
    section = config.megastab.parallel.activation_offload
    if section.kind == "none":
        return ""
    said = f"activations to {PLACES[section.kind]}, amount: {section.amount}"
    return said if section.amount == "all" else f"{said}; planned as if all of it went in time (--cluster says what does)"
