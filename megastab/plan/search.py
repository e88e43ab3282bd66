"""Every way to cut a run over a cluster, which of them fit, and which would be fastest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megastab.config.complete import ACCELERATOR_BUCKET
from megastab.config.config import Config
from megastab.config.errors import UserError
from megastab.config.layout import Layout
from megastab.config.rules import Facts, broken_rules, head_shares
from megastab.config.schema import Recompute
from megastab.plan.budget import Budget, largest_budget
from megastab.plan.cluster import Cluster
from megastab.plan.parameters import Stage, stages
from megastab.plan.predict import Prediction, predict
from megastab.plan.recompute import RECOMPUTES

LONG_SEQUENCE = 1 << 14
"""Positions from which ranks may share a sequence; below, a search tries it only where that may be what is missing."""
ALL_BATCHES = "the global batch cannot be shared by the data-parallel ranks"


@dataclass(frozen=True)
class Candidate:
    """One way that fits."""

    config: Config
    budget: Budget
    """Of the fullest stage."""
    prediction: Prediction

    @property
    def overrides(self) -> str:
        """What makes a config this one, for the command line."""
        parallel = self.config.megastab.parallel
        said = {
            "megastab.parallel.tensor": parallel.tensor,
            "megastab.parallel.context": parallel.context,
            "megastab.parallel.pipeline": parallel.pipeline,
            "megastab.parallel.sequence": str(parallel.sequence).lower(),
            "megastab.parallel.recompute": parallel.recompute,
            "zero_optimization.stage": self.config.zero_stage,
            "train_micro_batch_size_per_gpu": self.config.micro_batch,
        }
        return " ".join(f"{key}={value}" for key, value in said.items())


@dataclass
class Found:
    """What a search saw."""

    fitting: list[Candidate] = field(default_factory=list)
    """Fastest first."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why others are out, with how many."""
    closest: tuple[Config, Budget] | None = None
    """The one with the lowest peak, where none fits."""


def search(config: Config, cluster: Cluster) -> Found:
    """Cut ``config`` in every way: tensor x context x pipeline x data, ZeRO stage, recompute and micro-batch; its global batch stays.
    Ranks share sequences only where these are long, or where nothing fits and activations, or more ranks than samples, are the reason.

    Raises:
        UserError: the cluster says no peak for the config's precision.
    """
    check_precision(config, cluster)
    if config.megastab.model.max_seq_len >= LONG_SEQUENCE:
        return _searched(config, cluster, shares=True)
    found = _searched(config, cluster, shares=False)
    return _searched(config, cluster, shares=True) if _sharing_may_help(found) else found


def _sharing_may_help(found: Found) -> bool:
    if found.fitting:
        return False
    largest = found.closest[1].largest if found.closest else ""
    return ALL_BATCHES in found.reasons or largest in ("activations", "logits and loss")


def _searched(config: Config, cluster: Cluster, shares: bool) -> Found:
    found, held = Found(), dict[tuple[int, int], list[Stage]]()
    for candidate in candidates(config, cluster, found.reasons, shares):
        key = (candidate.layout.tensor, candidate.layout.pipeline)
        if key not in held:
            held[key] = distinct(stages(candidate.megastab.model, candidate.layout))
        budget = largest_budget(candidate, held[key], cluster)
        if budget.fits:
            found.fitting.append(Candidate(candidate, budget, predict(candidate, cluster, held[key])))
            continue
        found.reasons[f"does not fit, {budget.largest} most of all"] += 1
        if found.closest is None or budget.total < found.closest[1].total:
            found.closest = candidate, budget
    found.fitting.sort(key=lambda one: (one.prediction.seconds, one.budget.total))
    return found


def distinct(cut: Sequence[Stage]) -> list[Stage]:
    """The first of every kind of stage: later ones of the same weights hold no more micro-batches and send the same."""
    kinds: dict[tuple[object, ...], Stage] = {}
    for stage in cut:
        kinds.setdefault((stage.elements, stage.num_blocks, stage.has_embedding, stage.has_head), stage)
    return list(kinds.values())


def check_precision(config: Config, cluster: Cluster) -> None:
    """A cluster that says no peak for this precision cannot be predicted."""
    if config.precision not in cluster.peak_tflops:
        raise UserError(
            f"the cluster's peak_tflops has no {config.precision}, which the config trains in; it has {', '.join(cluster.peak_tflops)}."
        )


def candidates(config: Config, cluster: Cluster, reasons: Counter[str], shares: bool = False) -> Iterator[Config]:
    """Every cut that the config's rules allow; the others are counted. With ``shares`` also those where ranks share sequences."""
    for layout in _layouts(config, cluster, reasons, shares):
        samples, rest = divmod(config.global_batch, layout.data)
        if rest:
            reasons[ALL_BATCHES] += 1
            continue
        for stage in _zero_stages(config):
            if stage > 1 and layout.pipeline > 1:
                reasons["ZeRO 2 and 3 exclude pipeline stages"] += 1
                continue
            for micro in _powers(samples):
                for recompute in RECOMPUTES:
                    made = _cut(config, layout, stage, micro, recompute)
                    if broken_rules(Facts(made.megastab, made.deepspeed, layout)):
                        reasons["a rule of the config refuses it"] += 1
                    else:
                        yield made


def _layouts(config: Config, cluster: Cluster, reasons: Counter[str], shares: bool) -> Iterator[Layout]:
    model, world = config.megastab.model, cluster.world
    for tensor in (t for t in range(1, cluster.gpus_per_node + 1) if cluster.gpus_per_node % t == 0):
        if model.num_heads % tensor or model.ffn_hidden_size % tensor:
            reasons["heads or MLP channels cannot be cut over the tensor-parallel ranks"] += 1
            continue
        rest = world // tensor
        for pipeline in (p for p in range(1, min(model.num_layers, rest) + 1) if rest % p == 0):
            copies = rest // pipeline
            for context in _contexts(config, tensor, copies) if shares else (1,):
                yield Layout(world, tensor, pipeline, copies // context, context)
        if rest > model.num_layers:
            reasons["more pipeline stages than blocks"] += 1


def _contexts(config: Config, tensor: int, copies: int) -> list[int]:
    """Ways to share a sequence among ``copies`` ranks: by heads, in equal runs of positions."""
    model = config.megastab.model
    return [size for size in head_shares(model, tensor) if copies % size == 0 == model.max_seq_len % size]


def _zero_stages(config: Config) -> tuple[int, ...]:
    return (0, 1, 2, 3) if config.precision == "fp32" else (1, 2, 3)


def _powers(samples: int) -> Iterator[int]:
    micro = 1
    while samples % micro == 0 and micro <= 16:
        yield micro
        micro *= 2


def _cut(config: Config, layout: Layout, stage: int, micro: int, recompute: Recompute) -> Config:
    parallel = config.megastab.parallel.model_copy(
        update={
            "tensor": layout.tensor, "context": layout.context, "pipeline": layout.pipeline, "sequence": layout.tensor > 1,
            "recompute": recompute,
        }
    )  # fmt: skip
    zero = {"reduce_bucket_size": ACCELERATOR_BUCKET, **config.deepspeed.get("zero_optimization", {}), "stage": stage}
    batch: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": config.global_batch // (micro * layout.data),
        "zero_optimization": zero,
    }
    block = config.megastab.model_copy(update={"parallel": parallel})
    return replace(config, megastab=block, deepspeed={**config.deepspeed, **batch}, layout=layout)
