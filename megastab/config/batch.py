"""DeepSpeed's batch arithmetic: train_batch_size = micro batch x accumulation x data-parallel ranks.

DeepSpeed floors its divisions and then fails an assertion; here a wrong triple is told with the nearest one that works.
"""

from __future__ import annotations

from typing import Any

from megastab.config.errors import UserError
from megastab.config.layout import Layout

TRAIN = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"


def complete_batch(deepspeed: dict[str, Any], layout: Layout) -> dict[str, int]:
    """All three sizes, from any two of them (one of train and micro is enough: accumulation is 1 then)."""
    train, micro, accumulation = (_size(deepspeed, key) for key in (TRAIN, MICRO, ACCUMULATION))
    dp = layout.data
    if train is None and micro is None:
        raise UserError(f"{TRAIN} or {MICRO} is missing: give one of them, or two of {TRAIN}, {MICRO}, {ACCUMULATION}.")
    if train is None:
        accumulation = accumulation or 1
        train = micro * accumulation * dp  # type: ignore[operator]  # one of train and micro is given
    elif micro is None:
        accumulation = accumulation or 1
        micro = max(1, train // (accumulation * dp))
    elif accumulation is None:
        accumulation = max(1, train // (micro * dp))
    assert micro is not None
    if train != micro * accumulation * dp:
        raise UserError(_mismatch(deepspeed, train, micro, accumulation, layout))
    return {TRAIN: train, MICRO: micro, ACCUMULATION: accumulation}


def _size(deepspeed: dict[str, Any], key: str) -> int | None:
    value = deepspeed.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise UserError(f"{key} = {value!r} must be a whole number of samples from 1.")
    return value


def _mismatch(deepspeed: dict[str, Any], train: int, micro: int, accumulation: int, layout: Layout) -> str:
    keys = (TRAIN, MICRO, ACCUMULATION)
    said = ", ".join(f"{key} = {'not given' if deepspeed.get(key) is None else deepspeed[key]}" for key in keys)
    cut = " / ".join(f"{name} {size}" for name, size in (("world", layout.world), ("tensor", layout.tensor), ("pipeline", layout.pipeline)))
    cut += f" / context {layout.context}" if layout.context > 1 else ""
    has_micro, has_accumulation = deepspeed.get(MICRO) is not None, deepspeed.get(ACCUMULATION) is not None
    # A size that was not given may follow the batch, so that it does not coarsen what the batch can be.
    unit = (micro if has_micro else 1) * (accumulation if has_accumulation or not has_micro else 1) * layout.data
    nearest = unit if has_micro and has_accumulation else max(1, round(train / unit)) * unit
    fits = [f"{TRAIN} = {nearest}"]
    if has_micro and train % layout.data == 0:
        fits += _other_fits(train // layout.data, micro, has_accumulation)
    return (
        f"the batch sizes do not fit: {said}, and data-parallel ranks = {layout.data} ({cut}); {TRAIN} must be micro batch x accumulation "
        f"x data-parallel ranks. "
        f"The nearest fit is {', or '.join(fits)}."
    )


def _other_fits(samples_per_rank: int, micro: int, has_accumulation: bool) -> list[str]:
    """Ways to keep the global batch: another accumulation for this micro batch, or the largest smaller micro batch that divides."""
    if samples_per_rank % micro == 0:
        return [f"{ACCUMULATION} = {samples_per_rank // micro}"] if has_accumulation else []
    smaller = next(size for size in range(min(micro, samples_per_rank), 0, -1) if samples_per_rank % size == 0)
    return [f"{MICRO} = {smaller}" + (f" with {ACCUMULATION} = {samples_per_rank // smaller}" if has_accumulation else "")]
