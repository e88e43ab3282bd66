"""Attention kernels: each gives, beside the output, the log-sum-exp of every query's logits, and the gradients from both.

``backward`` forms P = exp(logits - lse) and D = rowsum(dout * out) from what it is handed, so that it is also the gradient of softmax
with further terms in its denominator when it is handed the lse and the output with those terms in them (``flash.py``).

Letters: B batch, N query heads, K key/value heads (N a multiple of K), S queries, L keys, H head width. Tensors are [B, N or K, S or L, H].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

aten = torch.ops.aten
Kept = tuple[Tensor | None, ...]  # what a kernel wants back besides the tensors every kernel wants
CHUNK_QUERIES = 64  # of the capped kernel: its workspace is B x N x 64 x L fp32 numbers


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees: with ``is_causal`` (then S = L) those up to its own, with ``seen`` [S, L] those told, else all."""

    is_causal: bool = True
    seen: Tensor | None = None

    def additive(self, dtype: torch.dtype) -> Tensor | None:
        """``seen`` as 0 and -inf to add to the logits."""
        return None if self.seen is None else torch.zeros_like(self.seen, dtype=dtype).masked_fill_(~self.seen, -torch.inf)

    def blind(self) -> Tensor | None:
        """[S], the queries that see no key; None where none can be."""
        return None if self.seen is None else ~self.seen.any(dim=-1)


class Kernel(Protocol):
    """A pair of functions; their gradients are the caller's to combine."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Kept]:
        """-> output [B, N, S, H], lse [B, N, S] (fp32 at least; -inf where no key is seen, and then the output is 0), and its own."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kept: Kept, mask: Mask
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> gradients of q, k and v."""
        ...

    @property
    def cap(self) -> float | None:
        """c of logits capped as c tanh(logit / c); None where they are not."""
        ...


class _Flash:
    cap: float | None = None


class CpuFlash(_Flash):
    """The operator behind SDPA on the CPU."""

    def takes(self, q: Tensor, mask: Mask) -> bool:
        """Whether it runs for these."""
        return q.device.type == "cpu" and q.is_floating_point()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Kept]:
        """As :class:`Kernel`."""
        q, k, v = _dense_rows(q, k, v)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, mask.is_causal, attn_mask=mask.additive(q.dtype))
        if (blind := mask.blind()) is not None:
            lse.masked_fill_(blind, -torch.inf)  # the operator says 0
        return out, lse, ()

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kept: Kept, mask: Mask
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :class:`Kernel`."""
        dout, q, k, v = _dense_rows(dout, q, k, v)
        bias = mask.additive(q.dtype)
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, mask.is_causal, attn_mask=bias)


class GpuFlash(_Flash):
    """FlashAttention, the operator behind SDPA on GPUs in half precision."""

    def takes(self, q: Tensor, mask: Mask) -> bool:
        """Whether it runs for these: the head widths are those it takes unpadded."""
        is_half = q.dtype in (torch.float16, torch.bfloat16)
        return q.is_cuda and is_half and mask.seen is None and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Kept]:
        """As :class:`Kernel`."""
        q, k, v = _dense_rows(q, k, v)
        out, lse, starts_q, starts_k, _, _, seed, offset, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, mask.is_causal)
        return out, lse, (starts_q, starts_k, seed, offset)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kept: Kept, mask: Mask
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :class:`Kernel`."""
        dout, q, k, v = _dense_rows(dout, q, k, v)
        starts_q, starts_k, seed, offset = kept
        lengths = (q.shape[2], k.shape[2])
        return aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, starts_q, starts_k, *lengths, 0.0, mask.is_causal, seed, offset
        )


def _dense_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The operators read rows of neighbouring numbers without looking: an expanded gradient is not one."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


FLASH = (CpuFlash(), GpuFlash())


def flash_for(q: Tensor, mask: Mask) -> Kernel | None:
    """The flash operator that takes ``q`` under ``mask``; None where there is none."""
    return next((kernel for kernel in FLASH if kernel.takes(q, mask)), None)


class Capped:
    """Logits c tanh(q.k / (c sqrt(H))) (Gemma 2, arXiv 2408.00118), a chunk of queries at a time and recomputed in backward.

    Memory is linear in L. No flash operator of torch's caps, so this one is several times slower.
    """

    def __init__(self, cap: float):
        self.cap: float | None = cap

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Kept]:
        """As :class:`Kernel`."""
        exact = torch.promote_types(q.dtype, torch.float32)
        keys, values = k.to(exact), v.to(exact)
        outs, lses = [], []
        for start in range(0, q.shape[2], CHUNK_QUERIES):
            chunk, stop = _Chunk.of(q, k, mask, start), _keys_seen(q, k, mask, start)
            logits, _ = self._logits(chunk, q, keys[:, :, :stop])
            lse = logits.logsumexp(dim=-1)
            p = (logits - lse[..., None].nan_to_num(neginf=0.0)).exp_()
            outs.append(chunk.from_groups(p.flatten(2, 3) @ values[:, :, :stop]).to(q.dtype))
            lses.append(chunk.flat(lse))
        return torch.cat(outs, dim=2), torch.cat(lses, dim=2), ()

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kept: Kept, mask: Mask
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :class:`Kernel`."""
        exact = torch.promote_types(q.dtype, torch.float32)
        keys, values = k.to(exact), v.to(exact)
        dkeys, dvalues, dqs, scale = torch.zeros_like(keys), torch.zeros_like(values), [], q.shape[-1] ** -0.5
        for start in range(0, q.shape[2], CHUNK_QUERIES):
            chunk, stop = _Chunk.of(q, k, mask, start), _keys_seen(q, k, mask, start)
            logits, slope = self._logits(chunk, q, keys[:, :, :stop])
            rows = slice(start, start + CHUNK_QUERIES)
            p = (logits - chunk.grouped(lse[:, :, rows])[..., None].nan_to_num(neginf=0.0)).exp_().flatten(2, 3)
            dout_groups, out_groups = (chunk.groups(x[:, :, rows]).to(exact) for x in (dout, out))
            dlogits = (dout_groups @ values[:, :, :stop].mT).sub_((dout_groups * out_groups).sum(-1, keepdim=True)).mul_(p)
            dlogits.mul_(slope.flatten(2, 3)).mul_(scale)
            dqs.append(chunk.from_groups(dlogits @ keys[:, :, :stop]).to(q.dtype))
            dkeys[:, :, :stop] += dlogits.mT @ chunk.groups(q[:, :, rows]).to(exact)
            dvalues[:, :, :stop] += p.mT @ dout_groups
        return torch.cat(dqs, dim=2), dkeys.to(k.dtype), dvalues.to(v.dtype)

    def _logits(self, chunk: _Chunk, q: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """[B, K, R, C, L] capped logits, -inf where a key is not seen, and their derivative."""
        queries = chunk.groups(q[:, :, chunk.start : chunk.start + CHUNK_QUERIES]).to(keys.dtype)
        assert self.cap is not None
        tanh = (queries @ keys.mT).mul_(q.shape[-1] ** -0.5 / self.cap).tanh_().unflatten(2, (chunk.repeats, -1))
        logits = tanh * self.cap
        if chunk.seen is not None:
            logits.masked_fill_(~chunk.seen, -torch.inf)
        return logits, 1.0 - tanh.square()


def _keys_seen(q: Tensor, k: Tensor, mask: Mask, start: int) -> int:
    """One past the last key a chunk may see."""
    return min(start + CHUNK_QUERIES, q.shape[2]) if mask.is_causal else k.shape[2]


@dataclass(frozen=True)
class _Chunk:
    """C neighbouring queries, the R heads that share a key head beside each other: groups are [B, K, R * C, H]."""

    start: int
    kv_heads: int
    repeats: int
    seen: Tensor | None
    """[C, keys up to the last one seen]."""

    @classmethod
    def of(cls, q: Tensor, k: Tensor, mask: Mask, start: int) -> _Chunk:
        stop, seen = _keys_seen(q, k, mask, start), None
        if mask.is_causal:
            seen = torch.ones(stop - start, stop, dtype=torch.bool, device=q.device).tril(start)
        elif mask.seen is not None:
            seen = mask.seen[start : start + CHUNK_QUERIES]
        return cls(start, k.shape[1], q.shape[1] // k.shape[1], seen)

    def groups(self, x: Tensor) -> Tensor:
        """[B, N, C, H] -> [B, K, R * C, H]."""
        return x.unflatten(1, (self.kv_heads, self.repeats)).flatten(2, 3)

    def from_groups(self, x: Tensor) -> Tensor:
        """[B, K, R * C, H] -> [B, N, C, H]."""
        return x.unflatten(2, (self.repeats, -1)).flatten(1, 2)

    def grouped(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, K, R, C]."""
        return x.unflatten(1, (self.kv_heads, self.repeats))

    def flat(self, x: Tensor) -> Tensor:
        """[B, K, R, C] -> [B, N, C]."""
        return x.flatten(1, 2)
