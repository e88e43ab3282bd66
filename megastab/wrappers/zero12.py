"""``DeepSpeedZeroOptimizer``: ZeRO stages 1 and 2, with or without CPU offload."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from megastab.parallel import collectives
from megastab.wrappers.adapter import Adapter, Fragment, defer_growth, hook_wrapper, specialise
from megastab.wrappers.bf16 import linked_fragment, linked_gradient


class Zero12Adapter(Adapter):
    """Masters flat per group, cut over data-parallel ranks."""

    relies_on = (
        "bit16_groups",
        "single_partition_of_fp32_groups",
        "parallel_partitioned_bit16_groups",
        "real_dp_process_group",
        "get_gradient_for_reduction",
        "_optimizer_step",
        "update_lp_params",
        "unscale_and_clip_grads",
        "averaged_gradients",
        "reset_cpu_buffers",
        "_update_scale",
        "clip_grad",
    )

    def __init__(self, engine: Any):
        super().__init__(engine)
        specialise(self.optimizer, **defer_growth(self))
        base, adapter = type(self.optimizer), self

        def optimizer_step(wrapper: Any, group: int) -> None:
            base._optimizer_step(wrapper, group)
            if group == len(wrapper.bit16_groups) - 1 and adapter.updated():
                _republish(wrapper, group)  # this last group's copy follows in DeepSpeed's own step

        def unscale_and_clip_grads(wrapper: Any, gradients: Any, norm: Any) -> None:
            if adapter.limit != float("inf") or wrapper.loss_scale != 1.0:  # a factor of 1 is no reason to touch every gradient
                base.unscale_and_clip_grads(wrapper, gradients, norm)

        def reset_cpu_buffers(wrapper: Any) -> None:
            base.reset_cpu_buffers(wrapper)
            # DeepSpeed 0.19.8 keeps an overflowed step's fp32 sums under offload and adds the next step's to them: every later step
            # would be skipped as well. After an ordinary step they are gone already.
            for group in wrapper.averaged_gradients:
                wrapper.averaged_gradients[group] = None

        hook_wrapper(
            self,
            _optimizer_step=optimizer_step,
            unscale_and_clip_grads=unscale_and_clip_grads,
            reset_cpu_buffers=reset_cpu_buffers,
        )

    @property
    def reduces_in_backward(self) -> bool:  # type: ignore[override]
        """Stage 2 reduces and frees gradients as they appear; stage 1 at the boundary."""
        return bool(self.optimizer.partition_gradients)

    def fragments(self) -> Iterator[Fragment]:
        """This rank's partition of the flat masters, parameter by parameter."""
        for parameter in self.parameters():
            yield from linked_fragment(self, parameter)

    def stepped(self) -> list[Tensor]:
        """One flat partition a group."""
        return list(self.optimizer.single_partition_of_fp32_groups)

    def publish(self) -> None:
        """Copy and all-gather, as at the end of a step."""
        self.optimizer.update_lp_params()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """What stage 1 will reduce: ``.grad``, or the fp32 accumulator where accumulation is wider than the weights."""
        return self.optimizer.get_gradient_for_reduction(parameter)

    def reduced(self, parameter: nn.Parameter) -> tuple[int, Tensor] | None:
        """This rank's partition, on the CPU under offload."""
        return linked_gradient(parameter)


def _republish(wrapper: Any, before: int) -> None:
    """Copy edited masters of groups [0, before) to low precision again: theirs was made before the edit."""
    for group in range(before):
        rank = collectives.rank_in(wrapper.real_dp_process_group[group])
        wrapper.parallel_partitioned_bit16_groups[group][rank].data.copy_(wrapper.single_partition_of_fp32_groups[group].data)
