"""Causal self-attention with grouped key/value heads, cut over tp by head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megastab.config.schema import ModelConfig
from megastab.model.context import Context
from megastab.model.kv_cache import KVCache
from megastab.model.rope import rope_table, rotate_split
from megastab.parallel.grid import TensorParallel, kv_copies
from megastab.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megastab.parallel.param_info import Part


class Attention(nn.Module):
    """q, k and v as one product where every rank has its own KV heads; q and k+v apart where ranks share a KV head, because who
    counts a parameter must have one answer for the whole of it."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, layer: int):
        super().__init__()
        self.theta = config.rope_theta if config.arch == "llama" else None
        self.head_dim = config.head_dim
        self.copies = kv_copies(config.num_kv_heads, tp.size)
        self.num_heads = config.num_heads // tp.size
        self.num_kv_heads = config.num_kv_heads * self.copies // tp.size
        name, has_bias = f"layers.{layer}.attention", config.arch == "gpt"
        q = Part.cut(f"{name}.q", "q", config.num_heads * self.head_dim, tp)
        k, v = (Part.cut(f"{name}.{x}", x, config.num_kv_heads * self.head_dim, tp, self.copies) for x in ("k", "v"))
        width = config.hidden_size
        if self.copies == 1:
            self.qkv = ColumnParallelLinear((q, k, v), width, tp, layer, has_bias)
        else:
            self.q = ColumnParallelLinear((q,), width, tp, layer, has_bias)
            self.kv = ColumnParallelLinear((k, v), width, tp, layer, has_bias, self.copies)
        o = Part.cut(f"{name}.o", "o", config.num_heads * self.head_dim, tp)
        self.o = RowParallelLinear(o, width, tp, layer, has_bias)

    def project(self, x_TD: Tensor) -> tuple[Tensor, ...]:
        """[T, D] -> (q+k+v [G, (N+2K)*H]), or (q [G, N*H], k+v [G, 2*K*H]) where ranks share KV heads."""
        return (self.qkv(x_TD),) if self.copies == 1 else (self.q(x_TD), self.kv(x_TD))

    def mix(self, projected: tuple[Tensor, ...], context: Context, cache: KVCache | None = None) -> Tensor:
        """Rotate and attend, without communication: -> [G, N*H]."""
        q_BSNH, k_BSKH, v_BSKH = self._heads(projected, context)
        if cache is not None:
            k_BSKH, v_BSKH = cache.append(k_BSKH, v_BSKH)
        return attend(q_BSNH, k_BSKH, v_BSKH, context.document_ids).reshape(context.batch * context.seq, -1)

    def _heads(self, projected: tuple[Tensor, ...], context: Context) -> tuple[Tensor, ...]:
        n, k = self.num_heads, self.num_kv_heads
        # (heads of each run, how many runs are turned): queries and keys turn, values do not
        runs = (((n, k, k), 2),) if self.copies == 1 else (((n,), 1), ((k, k), 1))
        fused = [x.view(context.batch, context.seq, -1, self.head_dim) for x in projected]
        if self.theta is None:
            return tuple(run for x, (heads, _) in zip(fused, runs, strict=True) for run in x.split(heads, dim=2))
        table = rope_table(context.seq, self.head_dim, self.theta, projected[0].device, context.first_position)
        return tuple(run for x, (heads, turned) in zip(fused, runs, strict=True) for run in rotate_split(x, table, heads, turned))

    def forward(self, x_TD: Tensor, context: Context, cache: KVCache | None = None) -> Tensor:
        """[T, D] -> [T, D]."""
        return self.o(self.mix(self.project(x_TD), context, cache))


def attend(q_BSNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """Causal attention of the last S of L positions: -> [B, S, N, H]. No S x S tensor is kept."""
    if document_ids is not None:
        return _attend_documents(q_BSNH, k_BLKH, v_BLKH, document_ids)
    q, k, v = (x.transpose(1, 2) for x in (q_BSNH, k_BLKH, v_BLKH))
    has_past = k.shape[2] != q.shape[2]
    mask = None
    if has_past and q.shape[2] > 1:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not has_past, enable_gqa=k.shape[1] != q.shape[1])
    return out.transpose(1, 2)


def _attend_documents(q_BSNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, document_ids: Tensor) -> Tensor:
    """Attention within documents: one causal call per run of equal ids, so that no mask is ever made."""
    samples = []
    for b in range(q_BSNH.shape[0]):
        lengths = torch.unique_consecutive(document_ids[b], return_counts=True)[1].tolist()
        runs = zip(*(x[b : b + 1].split(lengths, dim=1) for x in (q_BSNH, k_BSKH, v_BSKH)), strict=True)
        samples.append(torch.cat([attend(q, k, v) for q, k, v in runs], dim=1))
    return torch.cat(samples)
