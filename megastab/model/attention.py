"""Causal self-attention with grouped key/value heads, cut over tp by head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megastab.config.schema import ModelConfig
from megastab.model.context import Context
from megastab.model.flash import Extras, attend_with_bias, attend_with_logit
from megastab.model.kernels import Mask
from megastab.model.kv_cache import KVCache
from megastab.model.logit_watch import LargestLogits
from megastab.model.qk_norm import build_qk_norms
from megastab.model.rope import rope_table, rotate, rotate_split
from megastab.model.sinks import build_sink
from megastab.parallel.grid import Axis, TensorParallel, kv_copies
from megastab.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megastab.parallel.param_info import Part
from megastab.parallel.ulysses import own_heads, to_heads, to_positions

Call = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]  # q [B, N, S, H], k and v [B, K, L, H], mask -> [B, N, S, H]
Term = Tensor | tuple[Tensor, Tensor] | None  # of the sink: its logit [N], or its key and value [K, H]; None where it has no parameters
Look = Callable[[Tensor, Tensor, Term, Context], None]  # q [B, S, N, H], k [B, S, K, H], the sink's term, context


class Attention(nn.Module):
    """q, k and v as one product where every rank has its own KV heads; q and k+v apart where ranks share a KV head, because who
    counts a parameter must have one answer for the whole of it. The rows of an output gate lie behind q's product."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, layer: int):
        super().__init__()
        self.layer = layer
        self.logits: LargestLogits | None = None  # set where QK-clip is on
        self.look: Look | None = None  # set while telemetry looks
        self.theta, self.rope_scaling = (config.rope_theta if config.arch == "llama" else None), config.rope_scaling
        self.head_dim = config.head_dim
        self.copies = kv_copies(config.num_kv_heads, tp.size)
        self.num_heads = config.num_heads // tp.size
        self.num_kv_heads = config.num_kv_heads * self.copies // tp.size
        name, has_bias = f"layers.{layer}.attention", config.arch == "gpt"
        q = Part.cut(f"{name}.q", "q", config.num_heads * self.head_dim, tp)
        k, v = (Part.cut(f"{name}.{x}", x, config.num_kv_heads * self.head_dim, tp, self.copies) for x in ("k", "v"))
        width, gates = config.hidden_size, {"none": 0, "head": config.num_heads, "element": config.num_heads * self.head_dim}
        gate = (Part.cut(f"{name}.output_gate", "output_gate", gates[config.output_gate], tp),) if config.output_gate != "none" else ()
        self.gates = gates[config.output_gate] // tp.size
        if self.copies == 1:
            self.qkv = ColumnParallelLinear((q, k, v, *gate), width, tp, layer, has_bias)
        else:
            self.q = ColumnParallelLinear((q, *gate), width, tp, layer, has_bias)
            self.kv = ColumnParallelLinear((k, v), width, tp, layer, has_bias, self.copies)
        o = Part.cut(f"{name}.o", "o", config.num_heads * self.head_dim, tp)
        self.o = RowParallelLinear(o, width, tp, layer, has_bias)
        self.q_norm, self.k_norm = build_qk_norms(name, config, tp, layer)
        self.has_softmax1, self.sink, self.cap = config.sink == "softmax1", build_sink(name, config, tp, layer), config.attention_softcap

    @property
    def mixes_by_parameters(self) -> bool:
        """Whether :meth:`mix` calls modules that hold parameters."""
        return self.q_norm is not None or self.sink is not None

    def first_head(self, tp: TensorParallel, cp: Axis) -> int:
        """Of the model's query heads, the first that this rank attends with."""
        return tp.rank * self.num_heads + cp.rank * (self.num_heads // cp.size)

    def project(self, x_TD: Tensor) -> tuple[Tensor, ...]:
        """[T, D] -> (q+k+v [G, (N+2K)*H]), or (q [G, N*H], k+v [G, 2*K*H]) where ranks share KV heads; the first with the gate's rows
        behind, [G, N] or [G, N*H]."""
        return (self.qkv(x_TD),) if self.copies == 1 else (self.q(x_TD), self.kv(x_TD))

    def mix(self, projected: tuple[Tensor, ...], context: Context, cache: KVCache | None = None) -> Tensor:
        """Normalise, rotate, attend and gate: -> [G, N*H]. Only ``qk_norm: full`` and ranks that share a sequence communicate."""
        gate_GM = None
        if self.gates:
            first, gate_GM = projected[0].split((projected[0].shape[1] - self.gates, self.gates), dim=1)
            projected = (first, *projected[1:])
        q_BSNH, k_BSKH, v_BSKH = self.heads(projected, context)
        if cache is not None:
            k_BSKH, v_BSKH = cache.append(k_BSKH, v_BSKH)
        # From here on S is the whole sequence and N and K this rank's share of the heads, where ranks share a sequence.
        q_BSNH, k_BSKH, v_BSKH = to_heads(q_BSNH, k_BSKH, v_BSKH, context.cp)
        term = self._term(q_BSNH, context.cp)
        if self.look is not None and cache is None:
            self.look(q_BSNH, k_BSKH, term, context)
        out_BSNH = to_positions(attend(q_BSNH, k_BSKH, v_BSKH, context.document_ids, self._call(q_BSNH, term)), context.cp)
        out_GX = out_BSNH.reshape(context.batch * context.seq, -1)
        return out_GX if gate_GM is None else _gated(out_GX, gate_GM)

    def heads(self, projected: tuple[Tensor, ...], context: Context) -> tuple[Tensor, ...]:
        """q [B, S, N, H], k and v [B, S, K, H] as they are attended with: normalised and rotated; ``projected`` without the gate's rows."""
        n, k = self.num_heads, self.num_kv_heads
        # (heads of each run, how many runs are turned): queries and keys turn, values do not
        runs = (((n, k, k), 2),) if self.copies == 1 else (((n,), 1), ((k, k), 1))
        fused = [x.view(context.batch, context.seq, -1, self.head_dim) for x in projected]
        table = None
        if self.theta is not None:
            device = projected[0].device
            table = rope_table(context.seq, self.head_dim, self.theta, device, context.first_position, self.rope_scaling)
        if table is not None and self.q_norm is None:
            return tuple(run for x, (heads, turned) in zip(fused, runs, strict=True) for run in rotate_split(x, table, heads, turned))
        q_BSNH, k_BSKH, v_BSKH = (run for x, (heads, _) in zip(fused, runs, strict=True) for run in x.split(heads, dim=2))
        if self.q_norm is not None and self.k_norm is not None:
            q_BSNH, k_BSKH = self.q_norm(q_BSNH), self.k_norm(k_BSKH)
            if table is not None:
                q_BSNH, k_BSKH = rotate(q_BSNH, table), rotate(k_BSKH, table)
        return q_BSNH, k_BSKH, v_BSKH

    def _term(self, like: Tensor, cp: Axis) -> Term:
        """What the sink's parameters add to the heads that are here, its key normed as the others are."""
        term: Term = None if self.sink is None else self.sink(like)
        if isinstance(term, tuple):
            key_KH = term[0] if self.k_norm is None else self.k_norm(term[0][None, None])[0, 0]
            return own_heads(key_KH, cp), own_heads(term[1], cp)
        return None if term is None else own_heads(term, cp)

    def _call(self, like: Tensor, term: Term) -> Call:
        """Attention with this layer's sink, cap and watch."""
        extras = Extras(self.cap, self.logits if self.training else None)
        if self.has_softmax1:
            return partial(attend_with_logit, extras=extras)
        if term is None:
            return _plain if extras.are_none else partial(attend_with_logit, logit_N=like.new_full((1,), -torch.inf), extras=extras)
        if isinstance(term, Tensor):
            return partial(attend_with_logit, logit_N=term, extras=extras)
        return partial(attend_with_bias, bias=term, extras=extras)

    def forward(self, x_TD: Tensor, context: Context, cache: KVCache | None = None) -> Tensor:
        """[T, D] -> [T, D]."""
        return self.o(self.mix(self.project(x_TD), context, cache))


def _gated(out_GX: Tensor, gate_GM: Tensor) -> Tensor:
    """Each head (M = N) or channel (M = X) times the sigmoid of its gate (arXiv 2505.06708)."""
    return (out_GX.unflatten(1, (gate_GM.shape[1], -1)) * gate_GM.sigmoid().unsqueeze(-1)).flatten(1)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    has_groups = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.seen, is_causal=mask.is_causal, enable_gqa=has_groups)


def attend(q_BSNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, document_ids: Tensor | None = None, call: Call = _plain) -> Tensor:
    """Causal attention of the last S of L positions: -> [B, S, N, H]. No S x S tensor is kept."""
    if document_ids is not None:
        return _attend_documents(q_BSNH, k_BLKH, v_BLKH, document_ids, call)
    q, k, v = (x.transpose(1, 2) for x in (q_BSNH, k_BLKH, v_BLKH))
    has_past = k.shape[2] != q.shape[2]
    seen = None
    if has_past and q.shape[2] > 1:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    return call(q, k, v, Mask(not has_past, seen)).transpose(1, 2)


def _attend_documents(q_BSNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, document_ids: Tensor, call: Call) -> Tensor:
    """Attention within documents: one causal call per run of equal ids, so that no mask is ever made."""
    samples = []
    for b in range(q_BSNH.shape[0]):
        lengths = torch.unique_consecutive(document_ids[b], return_counts=True)[1].tolist()
        runs = zip(*(x[b : b + 1].split(lengths, dim=1) for x in (q_BSNH, k_BSKH, v_BSKH)), strict=True)
        samples.append(torch.cat([attend(q, k, v, call=call) for q, k, v in runs], dim=1))
    return torch.cat(samples)
