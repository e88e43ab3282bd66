"""``DeepSpeedZeroOptimizer_Stage3``: every parameter partitioned on its own, the last partition padded with junk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
from torch import Tensor, nn

from megastab.parallel import collectives
from megastab.parallel.grid import Grid
from megastab.wrappers.adapter import Adapter, Fragment, defer_growth, hook_wrapper, specialise, split_parts


def partitioned_build(config: dict[str, Any], grid: Grid) -> AbstractContextManager[Any]:
    """Context in which a model is built already partitioned over the data-parallel ranks."""
    return deepspeed.zero.Init(config_dict_or_path=config, data_parallel_group=grid.mpu().get_data_parallel_group(), mpu=grid.mpu())


def held(parameter: nn.Parameter) -> tuple[Tensor, int]:
    """(1-D view of the elements this rank holds, position of the first in the rank-local parameter)."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.data.view(-1), 0
    length = parameter.ds_tensor.ds_numel
    first = collectives.rank_in(parameter.ds_process_group) * length  # type: ignore[attr-defined]
    valid = max(0, min(length, parameter.ds_numel - first))  # type: ignore[attr-defined]
    return parameter.ds_tensor.data.view(-1)[:valid], first  # beyond that lies uninitialised memory


def gathered(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    """Context in which a partitioned parameter is whole (for reading; collective over data-parallel ranks)."""
    return deepspeed.zero.GatheredParameters([parameter])


class Zero3Adapter(Adapter):
    """Masters flat per sub-group, each a row of parameter partitions."""

    relies_on = (
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "grad_position",
        "averaged_gradients",
        "get_param_id",
        "_optimizer_step",
        "_reassign_or_swap_out_partitioned_parameters",
        "checkpoint_event_prologue",
        "checkpoint_event_epilogue",
        "_update_scale",
        "clip_grad",
    )
    reduces_in_backward = True
    partitions_weights = True

    def __init__(self, engine: Any):
        super().__init__(engine)
        specialise(self.optimizer, **defer_growth(self))
        base, adapter = type(self.optimizer), self

        def optimizer_step(wrapper: Any, group: int) -> None:
            base._optimizer_step(wrapper, group)
            if group == len(wrapper.fp16_groups) - 1 and adapter.updated():
                for earlier in range(group):  # their low-precision copies were made before the edit
                    wrapper._reassign_or_swap_out_partitioned_parameters(earlier)

        hook_wrapper(self, _optimizer_step=optimizer_step)

    def fragments(self) -> Iterator[Fragment]:
        """This rank's valid elements of every parameter."""
        for parameter in self.parameters():
            group, offset, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            low, first = held(parameter)
            master = self.optimizer.fp32_partitioned_groups_flat[group].data.narrow(0, int(offset), low.numel())
            yield from split_parts(parameter, self.info(parameter), first, master, low)

    def stepped(self) -> list[Tensor]:
        """One flat partition a sub-group."""
        return list(self.optimizer.fp32_partitioned_groups_flat)

    def publish(self) -> None:
        """Copy sub-group by sub-group; parameters that stay whole are gathered again."""
        self.optimizer.checkpoint_event_prologue()
        for group in range(len(self.optimizer.fp16_groups)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        self.optimizer.checkpoint_event_epilogue()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """None: gradients are reduced and partitioned as they appear."""
        return None

    def reduced(self, parameter: nn.Parameter) -> tuple[int, Tensor] | None:
        """This rank's partition without its padding; under offload it has already moved to the masters' ``.grad``."""
        group, offset, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        low, first = held(parameter)
        if self.optimizer.offload_optimizer:
            return first, self.optimizer.fp32_partitioned_groups_flat[group].grad.narrow(0, int(offset), low.numel())
        place = next(i for i, p in enumerate(self.optimizer.fp16_groups[group]) if p is parameter)
        return first, self.optimizer.averaged_gradients[group][place].view(-1).narrow(0, 0, low.numel())
