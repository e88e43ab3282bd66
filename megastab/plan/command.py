"""What ``tools/plan.py`` and ``pretrain.py --dry-run`` print."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from megastab.config.complete import ACCELERATOR_BUCKET
from megastab.config.config import Config
from megastab.config.errors import UserError
from megastab.config.load import load_config
from megastab.config.source import apply_overrides, read_source
from megastab.plan.cluster import Cluster, cluster_named
from megastab.plan.cluster_text import found_page, on_cluster, shortage
from megastab.plan.offload import offloaded
from megastab.plan.parameters import stages
from megastab.plan.plan import plan, with_vocabulary
from megastab.plan.predict import predict
from megastab.plan.recompute import on_cluster as by_recompute
from megastab.plan.search import Found, check_precision, search
from megastab.plan.text import render
from megastab.plan.traffic import traffic

MOST_NODES = 1 << 14
"""As far as a search for more nodes goes."""


def add_arguments(parser: argparse.ArgumentParser, when: str = "") -> None:
    """The options both commands share; ``when`` is added to what is said of each."""

    def option(name: str, said: str, **more: Any) -> None:
        parser.add_argument(name, help=said + when, **more)

    option("--world-size", "ranks to plan for (default: the cluster's, or WORLD_SIZE, else 1)", type=int, metavar="N")
    option("--cluster", "traffic and time, too: on h100, h200, a100-80, this-cpu, or what a JSON file says", metavar="NAME|FILE")
    option("--nodes", "nodes of the cluster (default: its own number)", type=int, metavar="N")
    option("--search", "rank every layout that fits the cluster", action="store_true")


def report(path: str, overrides: Sequence[str], options: argparse.Namespace, as_json: bool = False) -> str:
    """The page, or JSON.

    Raises:
        UserError: the config or the cluster cannot be used, or nothing fits.
    """
    if options.cluster is None:
        if options.search or options.nodes is not None:
            raise UserError("--search and --nodes plan for a cluster: add --cluster h100 (or h200, a100-80, this-cpu, a JSON file).")
        made = plan(load_config(path, overrides, options.world_size))
        return json.dumps(made.to_json(), indent=2) if as_json else render(made)
    cluster = cluster_named(options.cluster, options.nodes)
    if options.world_size not in (None, cluster.world):
        raise UserError(
            f"--world-size {options.world_size} is not the cluster's {cluster.nodes} x {cluster.gpus_per_node} GPUs: leave it out."
        )
    if options.search:
        return _searched(path, overrides, cluster, options.cluster, as_json)
    config = load_for(path, overrides, cluster, options.cluster)
    return _planned(config, cluster, as_json)


def load_for(path: str, overrides: Sequence[str], cluster: Cluster, name: str, world: int | None = None) -> Config:
    """The config as it would be loaded there: the size of gradient buckets depends on the machine."""
    ranks = cluster.world if world is None else world
    config = load_config(path, overrides, ranks)
    key = "zero_optimization.reduce_bucket_size"
    if name != "this-cpu" and any(completion.key == key for completion in config.completions):
        config = load_config(path, [*overrides, f"{key}={ACCELERATOR_BUCKET}"], ranks)
    return with_vocabulary(config)


def _planned(config: Config, cluster: Cluster, as_json: bool) -> str:
    check_precision(config, cluster)
    cut, made = stages(config.megastab.model, config.layout), plan(config)
    predicted = predict(config, cluster, cut)
    if not as_json:
        return f"{render(made)}\n\n{on_cluster(config, cluster, cut, predicted)}"
    sent = [[asdict(transfer) for transfer in traffic(config, stage)] for stage in cut]
    time = {**asdict(predicted), "seconds": predicted.seconds, "mfu": predicted.mfu}
    away = [asdict(offloaded(config, stage, cluster)) for stage in cut]
    by_policy = {name: {"memory": held.total, "fits": held.fits, "seconds": predicted.seconds, "mfu": predicted.mfu}
                 for name, held, predicted in by_recompute(config, cluster, cut)}  # fmt: skip
    found = {"cluster": asdict(cluster), "traffic": sent, "prediction": time, "activation_offload": away, "recompute_policies": by_policy}
    return json.dumps({**made.to_json(), **found}, indent=2)


def _searched(path: str, overrides: Sequence[str], cluster: Cluster, name: str, as_json: bool) -> str:
    config = spread(load_for(path, [*overrides, *_uncut(path, overrides)], cluster, name, world=1), cluster)
    found = search(config, cluster)
    if not found.fitting:
        raise UserError(_nearest_change(config, cluster, found))
    if not as_json:
        return found_page(found, cluster)
    rows = [{"overrides": one.overrides, "memory": one.budget.total, "seconds": one.prediction.seconds, "mfu": one.prediction.mfu}
            for one in found.fitting]  # fmt: skip
    return json.dumps({"cluster": asdict(cluster), "layouts": rows, "others": dict(found.reasons)}, indent=2)


def _uncut(path: str, overrides: Sequence[str]) -> list[str]:
    """Overrides that leave the layout open: the one the file names is among those to be judged, and must not stop the others."""
    written, _ = read_source(path)
    apply_overrides(written, overrides)
    if written.get("train_batch_size") is None:
        raise UserError("--search compares layouts of one global batch: give train_batch_size (in the file, or train_batch_size=1024).")
    keys = {"tensor": "1", "pipeline": "1", "context": "1", "sequence": "false"}
    batch = ["train_micro_batch_size_per_gpu=1", "gradient_accumulation_steps=null"]
    return [*(f"megastab.parallel.{key}={value}" for key, value in keys.items()), *batch]


def spread(config: Config, cluster: Cluster) -> Config:
    """``config`` of one rank, on all of them; a search cuts it further."""
    return replace(config, layout=replace(config.layout, world=cluster.world, data=cluster.world))


def _nearest_change(config: Config, cluster: Cluster, found: Found) -> str:
    """Why nothing fits, and what would be enough."""
    if found.closest is None:
        reasons = "; ".join(f"{reason} ({count})" for reason, count in found.reasons.most_common())
        return f"no layout of {cluster.world} ranks is allowed: {reasons}. Another train_batch_size, or another number of nodes, may be."
    said = shortage(*found.closest)
    nodes = 2 * cluster.nodes
    while nodes <= MOST_NODES:
        larger = replace(cluster, nodes=nodes)
        if search(spread(config, larger), larger).fitting:
            return f"{said}. The nearest change: --nodes {nodes}."
        nodes *= 2
    memory = found.closest[1].total / (found.closest[1].available + found.closest[1].reserve) * cluster.memory_gb
    return f"{said}. More nodes do not help: a GPU of {memory:.0f} GiB and a reserve would, or a smaller model."
