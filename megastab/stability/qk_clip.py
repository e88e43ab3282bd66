"""QK-clip (MuonClip, Kimi K2, arXiv 2507.20534, section 2.1): after an update, queries' and keys' weights of a head whose largest
attention logit in the step exceeded a threshold are shrunk, so that the same tokens would reach the threshold and no more.

    gamma = min(1, threshold / S)      S: the largest logit of the heads that share a key head, over batch and positions
    W_q <- gamma^balance W_q           every query head of the group; biases as well
    W_k <- gamma^(1 - balance) W_k

gamma is 1 wherever S does not exceed the threshold, also where it is negative: threshold / S is no factor there. The edit is made on the
fp32 masters at TVR's seam, so that every low-precision copy equals its master; what the heads reached is agreed on in one all-reduce.

Differs from Megatron-LM: biases shrink with their matrices, masters may be cut anywhere, and one collective serves all layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megastab.model.logit_watch import LargestLogits
from megastab.parallel import collectives
from megastab.parallel.collectives import Group
from megastab.wrappers.adapter import Fragment


class HeadClip(NamedTuple):
    """One query head whose largest logit was above the threshold."""

    layer: int
    head: int
    largest: float


@dataclass(frozen=True)
class WatchedLayer:
    """One attention layer of this rank: where its heads lie among the model's, and what they reached."""

    layer: int
    first_head: int
    logits: LargestLogits


class QKClip:
    """The projection of one model, cut over ranks in any way.

    Args:
        threshold: largest logit a head may reach (Kimi K2: 100).
        balance: share of ``log gamma`` the queries take (0.5: both the square root of gamma).
        heads: (layers, query heads, key heads, head width) of the model.
        watched: this rank's attention layers.
        group: all ranks of the job.
    """

    def __init__(
        self, threshold: float, balance: float, heads: tuple[int, int, int, int], watched: Iterable[WatchedLayer], group: Group = None
    ):
        self.threshold, self.balance, self.group = threshold, balance, group
        self.num_layers, self.num_heads, self.num_kv_heads, self.head_dim = heads
        self.watched = list(watched)
        self.largest = -torch.inf
        """Largest logit of the last step anywhere; an upper bound where it is below the threshold."""
        self.clipped: list[HeadClip] = []
        """What the last step clipped, over the whole model."""

    def forget(self) -> None:
        """Drop what was seen: the step is not applied."""
        self.clipped, self.largest = [], -torch.inf
        for each in self.watched:
            each.logits.take()

    def clip_fragments_(self, held: Iterable[Fragment]) -> bool:
        """Shrink this rank's masters by what all ranks saw since the last call (one MAX all-reduce); whether any was changed."""
        largest_LN = self._agreed()
        self.largest = float(largest_LN.max())
        over = (largest_LN > self.threshold).nonzero().tolist()
        self.clipped = [HeadClip(layer, head, float(largest_LN[layer, head])) for layer, head in over]
        if not over:
            return False
        gamma_LK = factors(largest_LN.unflatten(1, (self.num_kv_heads, -1)).amax(-1), self.threshold)
        by_role = {
            "q": gamma_LK.pow(self.balance).repeat_interleave(self.num_heads // self.num_kv_heads, 1),
            "k": gamma_LK.pow(1 - self.balance),
        }
        return any([self._shrink_(fragment, by_role) for fragment in held])  # noqa: C419 (a list: every fragment is edited)

    def _agreed(self) -> Tensor:
        """[L, N] on the CPU: the largest logit of every head of the model, -inf where none was seen."""
        table = torch.full((self.num_layers, self.num_heads), -torch.inf)
        for each in self.watched:
            found_N = each.logits.take()
            if found_N is not None:
                table[each.layer, each.first_head : each.first_head + len(found_N)] = found_N.cpu()
        collectives.max_(table, self.group)  # over (tp x dp x pp): heads are cut over tp, tokens over dp, layers over pp
        return table

    def _shrink_(self, fragment: Fragment, by_role: Mapping[str, Tensor]) -> bool:
        part, layer = fragment.part, fragment.info.layer
        role = part.name.removesuffix(".bias").rpartition(".")[2] if part.role == "bias" else part.role
        if layer is None or role not in by_role:
            return False
        factor_of_head, of_head = by_role[role][layer].tolist(), (fragment.info.width or 1) * self.head_dim
        first = part.start * (fragment.info.width or 1) + fragment.start  # in the global matrix
        is_changed = False
        for head in range(first // of_head, -(-(first + fragment.master.numel()) // of_head)):
            low, high = max(head * of_head - first, 0), min((head + 1) * of_head - first, fragment.master.numel())
            if factor_of_head[head] != 1.0:
                fragment.master.detach()[low:high].mul_(factor_of_head[head])
                is_changed = True
        return is_changed


def factors(largest: Tensor, threshold: float) -> Tensor:
    """``threshold / largest`` where ``largest`` exceeds it, 1 everywhere else (also where it is negative or not a number)."""
    return torch.where(largest > threshold, threshold / largest, 1.0)
