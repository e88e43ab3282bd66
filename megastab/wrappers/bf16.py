"""``BF16_Optimizer``: bf16 weights, fp32 masters cut over data-parallel ranks, fp32 gradients whole on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megastab.wrappers.adapter import Adapter, Fragment, block_norms, hook_wrapper, skip_lone_reduction, split_parts


class BF16Adapter(Adapter):
    """bf16 at ZeRO stage 1 with fp32 accumulation, with and without pipeline."""

    relies_on = (
        "bf16_groups",
        "fp32_groups_gradients",
        "fp32_groups_has_gradients",
        "fp32_groups_flat_partition",
        "update_lp_params",
        "get_grads_for_norm",
        "get_grads_for_reduction",
        "clear_hp_grads",
        "_update_hp_grad",
        "clip_grad",
    )

    def __init__(self, engine: Any):
        super().__init__(engine)
        base, adapter = type(self.optimizer), self
        self._are_sums_old = False
        skip_lone_reduction(engine)

        def get_grads_for_norm(wrapper: Any, for_clipping: bool = False) -> Any:
            adapter._forget_unused()
            found = base.get_grads_for_norm(wrapper, for_clipping)
            if for_clipping:
                return found
            dense, expert = found
            # A rank with nothing to count (a stage whose parameters all count elsewhere) must still join the reduction.
            return block_norms(dense) or [torch.zeros(1, device=wrapper.fp32_groups_gradients_flat[0].device)], expert

        def get_grads_for_reduction(wrapper: Any) -> Any:
            adapter._forget_unused()
            return base.get_grads_for_reduction(wrapper)

        def update_lp_params(wrapper: Any) -> None:
            if adapter.in_step:  # loading a checkpoint publishes too
                adapter.updated()
            base.update_lp_params(wrapper)

        hook_wrapper(
            self,
            get_grads_for_norm=get_grads_for_norm,
            get_grads_for_reduction=get_grads_for_reduction,
            update_lp_params=update_lp_params,
            clear_hp_grads=lambda wrapper: adapter._clear(),
            _update_hp_grad=lambda wrapper, *place: adapter._accumulate(*place),
        )

    def _accumulate(self, parameter: nn.Parameter, group: int, index: int, clear_lp_grads: bool = False) -> None:
        """Add a micro-batch's bf16 gradient to the fp32 sum; the first one is written, so that the sums need not be zeroed.

        The bf16 gradient is dropped at once. DeepSpeed keeps it, zeroes it and adds the next into it: 2 bytes a parameter and two passes.
        """
        if parameter.grad is None:
            return
        total, flags = self.optimizer.fp32_groups_gradients[group][index], self.optimizer.fp32_groups_has_gradients[group]
        gradient = parameter.grad.view(total.shape)
        if flags[index]:
            total.add_(gradient)
        else:
            total.copy_(gradient)
        parameter._hp_grad, flags[index] = total, True  # type: ignore[attr-defined]
        parameter.grad = None

    def _clear(self) -> None:
        self.optimizer.fp32_groups_has_gradients[:] = [[False] * len(group) for group in self.optimizer.bf16_groups]
        self._are_sums_old = True

    def _forget_unused(self) -> None:
        """Before anything reads the sums: parameters this step did not reach still hold the last step's."""
        if not self._are_sums_old:
            return
        self._are_sums_old = False
        for totals, flags in zip(self.optimizer.fp32_groups_gradients, self.optimizer.fp32_groups_has_gradients, strict=True):
            for total, is_written in zip(totals, flags, strict=True):
                if not is_written:
                    total.zero_()

    def fragments(self) -> Iterator[Fragment]:
        """This rank's partition of the flat masters, parameter by parameter."""
        for parameter in self.parameters():
            yield from linked_fragment(self, parameter)

    def stepped(self) -> list[Tensor]:
        """One flat partition a group."""
        return list(self.optimizer.fp32_groups_flat_partition)

    def publish(self) -> None:
        """Copy and all-gather, as at the end of a step."""
        self.optimizer.update_lp_params()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The fp32 accumulation buffer of this step."""
        gradient = getattr(parameter, "_hp_grad", None)
        return None if gradient is None else gradient.view_as(parameter)

    def reduced(self, parameter: nn.Parameter) -> tuple[int, Tensor] | None:
        """This rank's partition of the fp32 sum; the rest of it is another rank's to update with."""
        return linked_gradient(parameter)


def linked_fragment(adapter: Adapter, parameter: nn.Parameter) -> Iterator[Fragment]:
    """Pieces of ``parameter`` by the link DeepSpeed keeps from it to the flat partition (none if another rank owns it all).

    The link is made anew by a load, so it is read afresh each time.
    """
    link = getattr(parameter, "_hp_mapping", None)
    if link is None:
        return
    first = link.lp_fragment_address.start
    yield from split_parts(parameter, adapter.info(parameter), first, link.hp_fragment, parameter, first)


def linked_gradient(parameter: nn.Parameter) -> tuple[int, Tensor] | None:
    """The same piece of the reduced gradient (BF16_Optimizer keeps the whole gradient, ZeRO 1 and 2 the piece alone)."""
    link = getattr(parameter, "_hp_mapping", None)
    if link is None:
        return None
    first, length = link.lp_fragment_address.start, link.lp_fragment_address.numel
    gradient = link.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)  # type: ignore[attr-defined]
    return first, gradient if gradient.numel() == length else gradient.narrow(0, first, length)
