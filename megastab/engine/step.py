"""The seams of one optimizer step, in the order DeepSpeed reaches them.

    forward, backward x accumulation     DeepSpeed
    gradients_ready                      terms of one gradient that lie on several ranks are summed
    reduction over data-parallel ranks   DeepSpeed
    norm_known                           one decision, equal on every rank (stability.controller)
    scale, optimizer update              DeepSpeed, with that decision
    weights_updated                      edits of the fp32 masters
    publication (copy, all-gather)       DeepSpeed

``norm_known`` and ``weights_updated`` are the adapter's ``on_norm`` and ``after_update``; this file holds ``gradients_ready``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from megastab.parallel import collectives
from megastab.parallel.collectives import Group
from megastab.wrappers.adapter import Adapter
from megastab.wrappers.pipeline import before_reduction


def complete_gradients(adapter: Adapter) -> None:
    """Have every gradient that is a sum over ranks summed before anything reads it.

    Under sequence parallel a gain or bias sees a share of the tokens; a KV head held by several ranks sees a share of the queries.
    One coalesced fp32 all-reduce per group, at the accumulation boundary. Where gradients leave ``.grad`` during backward (ZeRO 2 and
    3) each is summed as it appears; tensor-parallel ranks run the same graph, so they meet in the same order.
    """
    by_group: dict[int, tuple[Group, list[nn.Parameter]]] = {}
    for parameter in adapter.parameters():
        group = adapter.info(parameter).grad_group
        if group is not None:
            by_group.setdefault(id(group), (group, []))[1].append(parameter)
    if adapter.reduces_in_backward:
        for group, parameters in by_group.values():
            for parameter in parameters:
                parameter.register_hook(_summed_over(group))
        return

    def gradients_ready() -> None:
        for group, parameters in by_group.values():
            gradients = [adapter.gradient(p) for p in parameters]
            collectives.sum_coalesced_([g for g in gradients if g is not None], group)

    before_reduction(adapter, gradients_ready)


def _summed_over(group: Group) -> Callable[[Tensor], Tensor]:
    def hook(gradient: Tensor) -> Tensor:
        whole = gradient.float()
        collectives.sum_(whole, group)
        return whole.to(gradient.dtype)

    return hook
