"""Bytes of weights, gradients and optimizer states on one rank, as DeepSpeed 0.19.8's wrappers hold them.

n parameters on the rank, p = n / dp its share (dp: all copies of the weights, ranks that share a sequence included), w = 2 or 4 bytes a
weight; sums of micro-batches are always fp32:

| wrapper        | weights    | gradients, end of backward          | masters | moments | more inside the step          |
|----------------|------------|-------------------------------------|---------|---------|-------------------------------|
| none (fp32)    | 4n         | 4n                                  | -       | 8n      | -                             |
| BF16_Optimizer | 2n         | 4n sums, not sharded                | 4p      | 8p      | -                             |
| ZeRO 1         | w n        | 4n                                  | 4p      | 8p      | flat copy of a group: 4p      |
| ZeRO 2         | w n        | 4p                                  | 4p      | 8p      | flat copy of a group: 4p      |
| ZeRO 3         | w p + kept | 4p                                  | 4p      | 8p      | flat fp32 copy: 4p if 16-bit  |

"kept": ZeRO 3 leaves parameters up to ``stage3_param_persistence_threshold`` whole on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from megastab.config.config import Config
from megastab.config.settings import offload_device
from megastab.plan.fetching import fetched
from megastab.plan.parameters import Stage, Weight, decay_groups
from megastab.plan.zero import FP32, bucket_elements, kept_whole, overlaps, weight_bytes, wrapper_kind

# Moments of an optimizer, in fp32 copies of the parameters; one we do not know is taken for an Adam.
MOMENTS = {"SGD": 0}
ADAM_MOMENTS = 2
NCCL_ALIGNMENT = 2  # DeepSpeed aligns flat groups to 2 elements a rank
ALLREDUCE_ELEMENTS = 500_000_000  # engine.MEMORY_OPT_ALLREDUCE_SIZE: gradients of stage 0 and BF16_Optimizer travel in such buckets


@dataclass(frozen=True)
class States:
    """Bytes on the device of one rank, and what is offloaded from it."""

    weights: int
    gradients: int
    masters: int
    moments: int
    buckets: int
    """Communication buffers, alive during backward or reduction, and the copies a reduction makes of what is in them."""
    step_workspace: int
    """What exists only while the optimizer steps, when there are no activations."""
    host: int = 0
    """Masters, moments and gradient shares held in host memory by ``offload_optimizer``."""
    gathered: int = 0
    """Weights ZeRO 3 has gathered at once and lets go again."""


def states(config: Config, stage: Stage) -> States:
    """One rank of ``stage``."""
    kind, size = wrapper_kind(config), weight_bytes(config)
    offloads = offload_device(config.deepspeed, "optimizer") != "none"
    dp, n = config.layout.copies, stage.elements
    groups = decay_groups_of(config, stage)
    shares = [_share(group, dp, per_tensor=kind == "zero3") for group in groups]
    p = n if kind == "plain" else sum(shares)
    weights = size * n if kind != "zero3" else size * (p + (_kept(config, stage.weights) if dp > 1 else 0))
    masters = 0 if kind == "plain" else FP32 * p
    moments = FP32 * p * _moments(config)
    gradients = {"plain": FP32 * n, "bf16": FP32 * n, "zero1": FP32 * n}.get(kind, FP32 * p)
    workspace = {"zero1": FP32 * max(shares), "zero2": FP32 * max(shares)}.get(kind, 0)
    if kind == "zero3" and size != FP32:
        workspace = FP32 * max(shares)
    buckets = _buckets(config, kind, groups, stage, size)
    gathered = size * fetched(config, stage).peak if kind == "zero3" else 0
    if offloads:
        # ZeRO 3 keeps its gradient partition on the host too; ZeRO 1 and 2 a pinned fp32 copy of it and a 16-bit one of the weights.
        device_gradients = 0 if kind == "zero3" else size * n if config.zero_stage == 1 else 0
        return States(weights, device_gradients, 0, 0, buckets, 0, host=masters + moments + FP32 * p + size * p, gathered=gathered)
    return States(weights, gradients, masters, moments, buckets, workspace, gathered=gathered)


def decay_groups_of(config: Config, stage: Stage) -> list[list[Weight]]:
    """The optimizer's groups on one rank of ``stage``."""
    return decay_groups(stage.weights, float(config.optimizer_params.get("weight_decay", 0.0)))


def padded_elements(config: Config, stage: Stage) -> list[int]:
    """Length of each decay group's flat tensor (BF16_Optimizer, ZeRO 1 and 2)."""
    dp = config.layout.copies
    return [dp * _share(group, dp, per_tensor=False) for group in decay_groups_of(config, stage)]


def _share(group: list[Weight], dp: int, per_tensor: bool) -> int:
    """Elements of a decay group one data-parallel rank owns, alignment included."""
    if per_tensor:
        return sum(-(-weight.elements // dp) for weight in group)
    unit = NCCL_ALIGNMENT * dp
    return -(-sum(weight.elements for weight in group) // unit) * NCCL_ALIGNMENT


def _kept(config: Config, weights: tuple[Weight, ...]) -> int:
    return sum(weight.elements for weight in kept_whole(config, weights))


def _moments(config: Config) -> int:
    copies = MOMENTS.get(config.optimizer_type, ADAM_MOMENTS)
    return 1 if config.optimizer_type == "SGD" and config.optimizer_params.get("momentum") else copies


def _buckets(config: Config, kind: str, groups: list[list[Weight]], stage: Stage, size: int) -> int:
    """Bytes of the buffers gradients are reduced in. ZeRO flattens what a buffer holds once more to send it, and widens it to fp32; a
    parameter larger than the buffer goes by itself."""
    n = stage.elements
    if kind in ("plain", "bf16") and config.layout.copies == 1:
        return 0  # nothing to reduce, and no copy made for it
    if kind == "plain":
        return FP32 * min(n, ALLREDUCE_ELEMENTS)
    if kind == "bf16":
        return FP32 * _copied_to_reduce([sum(w.elements for w in group) for group in groups])
    bucket = bucket_elements(config)
    sent = max(min(n, bucket), *(weight.elements for weight in stage.weights))
    if kind == "zero3":
        return FP32 * (bucket + max(min(n, bucket), *(_sent_alone(weight.elements, config.layout.copies) for weight in stage.weights)))
    staged = size if kind == "zero2" else FP32  # ZeRO 2 stages low-precision gradients, ZeRO 1 the fp32 sums
    copies = staged if staged == FP32 else staged + FP32
    if size == FP32 and config.layout.copies == 1:
        copies = 0  # one owner and nothing to widen: the buffer itself is handed on
    # A pipeline's reduction allocates a buffer of its own beside the one that backward has left.
    buffers = 2 if overlaps(config) or config.layout.pipeline > 1 else 1
    return staged * bucket * buffers + copies * sent


def _sent_alone(elements: int, dp: int) -> int:
    """What ZeRO 3 copies of a parameter that goes by itself: its fp32 form, and that once more, padded, where shares are unequal."""
    share = -(-elements // dp)
    return elements if elements == share * dp else 2 * share * dp


def _copied_to_reduce(flat_groups: list[int]) -> int:
    """Largest bucket of flat gradient groups; a group that fills a bucket alone is reduced in place."""
    largest, pending = 0, []
    for elements in flat_groups:
        pending.append(elements)
        if sum(pending) > ALLREDUCE_ELEMENTS:
            largest, pending = max(largest, sum(pending) if len(pending) > 1 else 0), []
    return max(largest, sum(pending) if len(pending) > 1 else 0)
