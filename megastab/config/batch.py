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
    fits = [f"{TRAIN} = {_nearest(deepspeed, train, micro, accumulation, layout.data)}"]
    if deepspeed.get(ACCUMULATION) is not None and train % (micro * layout.data) == 0:
        fits.append(f"{ACCUMULATION} = {train // (micro * layout.data)}")
    return (
        f"the batch sizes do not fit: {said}, and data-parallel ranks = {layout.data} (world {layout.world} / tensor {layout.tensor} / "
        f"pipeline {layout.pipeline}); {TRAIN} must be micro batch x accumulation x data-parallel ranks. "
        f"The nearest fit is {', or '.join(fits)}."
    )


def _nearest(deepspeed: dict[str, Any], train: int, micro: int, accumulation: int, dp: int) -> int:
    """The closest batch that the given micro batch and accumulation allow; a size that was not given may follow it."""
    if deepspeed.get(MICRO) is None:
        return max(1, round(train / (accumulation * dp))) * accumulation * dp
    if deepspeed.get(ACCUMULATION) is None:
        return max(1, round(train / (micro * dp))) * micro * dp
    return micro * accumulation * dp
