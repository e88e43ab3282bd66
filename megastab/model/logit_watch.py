"""The largest attention logit of each head over a step, for QK-clip: from the log-sum-exp a flash kernel leaves behind.

A row's largest logit is at most its log-sum-exp. So a head whose largest log-sum-exp is below the threshold needs nothing more, and
only the others are looked at again, a chunk of queries at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megastab.model.kernels import Kept, Kernel, Mask

CHUNK_ELEMENTS = 1 << 22  # logits in flight


class LargestLogits:
    """Largest ``q.k / sqrt(H)`` of each of this rank's query heads since the last :meth:`take`: exact above ``threshold``, an upper
    bound below it."""

    def __init__(self, threshold: float):
        self.threshold = threshold
        self._found_N: Tensor | None = None

    @torch.no_grad()
    def see(self, q_BNSH: Tensor, k_BKLH: Tensor, lse_BNS: Tensor | None = None) -> None:
        """Take causal attention of the last S of L positions into account.

        Args:
            q_BNSH: queries as the kernel gets them.
            k_BKLH: keys likewise.
            lse_BNS: log-sum-exp over the keys alone, without any sink; None where the kernel keeps it to itself.
        """
        heads, kv_heads = q_BNSH.shape[1], k_BKLH.shape[1]
        largest_N = q_BNSH.new_full((heads,), torch.inf, dtype=torch.float32) if lse_BNS is None else lse_BNS.amax((0, 2)).float()
        for head in (largest_N > self.threshold).nonzero().flatten().tolist():
            largest_N[head] = largest_logit(q_BNSH[:, head], k_BKLH[:, head * kv_heads // heads])
        self._found_N = largest_N if self._found_N is None else torch.maximum(self._found_N, largest_N)

    def take(self) -> Tensor | None:
        """[N] fp32, and start anew; None if nothing was seen."""
        found_N, self._found_N = self._found_N, None
        return found_N


def largest_logit(q_BSH: Tensor, k_BLH: Tensor) -> Tensor:
    """The largest causal logit of one head, in fp32; the S queries are the last of L positions."""
    batch, seq, width = q_BSH.shape
    past = k_BLH.shape[1] - seq
    keys_BHL = k_BLH.float().transpose(1, 2)
    largest = torch.full((), -torch.inf, device=q_BSH.device)
    rows = max(1, CHUNK_ELEMENTS // (batch * k_BLH.shape[1]))
    for first in range(0, seq, rows):
        last = min(first + rows, seq)
        seen = past + last
        logits_BRL = q_BSH[:, first:last].float() @ keys_BHL[:, :, :seen] / width**0.5
        is_future_RL = torch.ones(last - first, seen, dtype=torch.bool, device=q_BSH.device).triu(past + first + 1)
        largest = torch.maximum(largest, logits_BRL.masked_fill(is_future_RL, -torch.inf).amax())
    return largest


@dataclass(frozen=True)
class WatchedKernel:
    """A kernel that tells ``logits`` what it is given."""

    kernel: Kernel
    logits: LargestLogits

    @property
    def cap(self) -> float | None:
        """As :class:`Kernel`."""
        return self.kernel.cap

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Kept]:
        """As :class:`Kernel`."""
        out, lse, kept = self.kernel.forward(q, k, v, mask)
        self.logits.see(q, k, lse)
        return out, lse, kept

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kept: Kept, mask: Mask
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :class:`Kernel`."""
        return self.kernel.backward(dout, q, k, v, out, lse, kept, mask)
