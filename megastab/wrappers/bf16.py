"""``BF16_Optimizer``: bf16 weights, fp32 masters cut over data-parallel ranks, fp32 gradients whole on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megastab.wrappers.adapter import Adapter, Fragment, block_norms, hook_wrapper, split_parts


class BF16Adapter(Adapter):
    """bf16 at ZeRO stage 1 with fp32 accumulation, with and without pipeline."""

    relies_on = (
        "bf16_groups",
        "fp32_groups_gradients",
        "fp32_groups_flat_partition",
        "update_lp_params",
        "get_grads_for_norm",
        "clip_grad",
    )

    def __init__(self, engine: Any):
        super().__init__(engine)
        base, adapter = type(self.optimizer), self

        def get_grads_for_norm(wrapper: Any, for_clipping: bool = False) -> Any:
            found = base.get_grads_for_norm(wrapper, for_clipping)
            if for_clipping:
                return found
            dense, expert = found
            dense = block_norms(dense)
            # A rank with nothing to count (a stage whose parameters all count elsewhere) must still join the reduction.
            return dense or [torch.zeros(1, device=wrapper.fp32_groups_gradients_flat[0].device)], expert

        def update_lp_params(wrapper: Any) -> None:
            if adapter.in_step:  # loading a checkpoint publishes too
                adapter.updated()
            base.update_lp_params(wrapper)

        hook_wrapper(self, get_grads_for_norm=get_grads_for_norm, update_lp_params=update_lp_params)

    def fragments(self) -> Iterator[Fragment]:
        """This rank's partition of the flat masters, parameter by parameter."""
        for parameter in self.parameters():
            yield from linked_fragment(self, parameter)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The fp32 accumulation buffer of this step."""
        gradient = getattr(parameter, "_hp_grad", None)
        return None if gradient is None else gradient.view_as(parameter)


def linked_fragment(adapter: Adapter, parameter: nn.Parameter) -> Iterator[Fragment]:
    """Pieces of ``parameter`` by the link DeepSpeed keeps from it to the flat partition (none if another rank owns it all).

    The link is made anew by a load, so it is read afresh each time.
    """
    link = getattr(parameter, "_hp_mapping", None)
    if link is None:
        return
    first, length = link.lp_fragment_address.start, link.lp_fragment_address.numel
    low = parameter.data.view(-1).narrow(0, first, length)
    yield from split_parts(parameter, adapter.info(parameter), first, link.hp_fragment.view(-1), low)
