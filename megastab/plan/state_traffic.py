"""Gradients on their way to the update, and weights on their way back: what ``engine.step`` and DeepSpeed 0.19.8's wrappers send.

n parameters on the rank, m micro-batches, w bytes a weight; gradients travel in fp32 (``communication_data_type``):

| wrapper        | gradients, data-parallel          | weights, data-parallel                                             |
|----------------|-----------------------------------|--------------------------------------------------------------------|
| none (fp32)    | all-reduce 4n a step              | -                                                                  |
| BF16_Optimizer | all-reduce 4n a step, padded      | all-gather 2n a step                                               |
| ZeRO 1         | all-reduce 4n a step              | all-gather w n a step                                              |
| ZeRO 2         | all-reduce 4n a micro-batch       | all-gather w n a step                                              |
| ZeRO 3         | reduce-scatter 4n a micro-batch   | all-gather by use (``plan.fetching``); the kept ones, once a step   |

ZeRO 1 and 2 reduce to every rank and keep a slice of it (``use_multi_rank_bucket_allreduce``): twice what a reduce-scatter sends. ZeRO
2 and 3 reduce each micro-batch apart, whatever the accumulation.
"""

from __future__ import annotations

from collections.abc import Iterator

from megastab.config.config import Config
from megastab.plan.fetching import fetched
from megastab.plan.parameters import Stage, Weight
from megastab.plan.states import ALLREDUCE_ELEMENTS, decay_groups_of, padded_elements
from megastab.plan.transfer import Group, Transfer, kv_copies
from megastab.plan.zero import FP32, bucket_elements, kept_whole, weight_bytes, wrapper_kind


def state_traffic(config: Config, stage: Stage) -> Iterator[Transfer]:
    """Reduction over data-parallel ranks, and publication of the updated weights."""
    if config.layout.copies == 1:
        return
    kind, n, times = wrapper_kind(config), stage.elements, config.accumulation
    if kind == "zero3":
        yield from _zero3(config, stage)
        return
    rounds = times if kind == "zero2" else 1
    bucket = bucket_elements(config) if config.zero_stage >= 1 and kind != "bf16" else ALLREDUCE_ELEMENTS
    flat = sum(padded_elements(config, stage))
    sent = flat if kind == "bf16" else n  # BF16_Optimizer reduces its flat groups, padding and all
    yield Transfer("gradients", "all_reduce", "data", FP32 * sent * rounds, -(-sent // bucket) * rounds)
    if kind != "plain":
        yield Transfer("updated weights", "all_gather", "data", weight_bytes(config) * flat, len(decay_groups_of(config, stage)))


def _zero3(config: Config, stage: Stage) -> Iterator[Transfer]:
    dp, size, times = config.layout.copies, weight_bytes(config), config.accumulation
    bucket = bucket_elements(config)
    whole = sum(_padded(weight, dp) for weight in stage.weights)
    yield Transfer("gradients", "reduce_scatter", "data", FP32 * whole * times, -(-whole // bucket) * times)
    kept = kept_whole(config, stage.weights)
    released = [weight for weight in stage.weights if weight not in kept]
    if kept:
        yield Transfer("weights kept whole", "all_gather", "data", size * sum(_padded(w, dp) for w in kept), len(kept))
    gathers = fetched(config, stage).gathers
    elements = sum(_padded(weight, dp) * gathers[weight.name] for weight in released)
    yield Transfer("weights as they are used", "all_gather", "data", size * elements * times, sum(gathers.values()) * times)


def _padded(weight: Weight, dp: int) -> int:
    return -(-weight.elements // dp) * dp


def gradient_terms(config: Config, stage: Stage) -> Iterator[Transfer]:
    """Gradients of which several tensor-parallel ranks hold terms (``engine.step``), and of a matrix tied over stages."""
    times, by_group = config.accumulation, _terms(config, stage)
    for group, weights in by_group.items():
        elements = sum(weight.elements for weight in weights)
        if config.zero_stage >= 2:  # summed as they appear, each alone
            yield Transfer("terms of one gradient", "all_reduce", group, FP32 * elements * times, len(weights) * times)
        elif weights:
            yield Transfer("terms of one gradient", "all_reduce", group, FP32 * elements, 1)
    tied = next((w for w in stage.weights if w.name == "embedding"), None)
    if config.layout.pipeline > 1 and config.megastab.model.tie_embeddings and tied is not None:
        yield Transfer("tied matrix", "all_reduce", "ends", FP32 * tied.elements, 1)


def _terms(config: Config, stage: Stage) -> dict[Group, list[Weight]]:
    """The weights whose gradients are sums over a group, by group."""
    model = config.megastab.model
    heads = tuple(part for part in (".kv", ".kv.bias", *_shared_vectors(config)) if kv_copies(config) > 1)
    cut = (".qkv.bias", ".q.bias", ".kv.bias", ".up.bias", ".sink")
    found: dict[Group, list[Weight]] = {"heads": [w for w in stage.weights if w.name.endswith(heads)] if heads else [], "tensor": []}
    if config.layout.tensor == 1:
        return {}
    for weight in stage.weights:
        name = weight.name
        if name.endswith((".q_norm", ".k_norm")):
            if model.qk_norm == "head":  # one gain for heads on every rank
                found["tensor"].append(weight)
        elif config.megastab.parallel.sequence and (name == "positions" or (not weight.decays and not name.endswith(cut))):
            found["tensor"].append(weight)
    return found


def _shared_vectors(config: Config) -> list[str]:
    """Vectors cut by KV head."""
    model = config.megastab.model
    return [".k_norm"] * (model.qk_norm == "full") + [".sink"] * (model.sink == "kv_bias")
