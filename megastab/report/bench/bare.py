"""The yardstick of the bench: LLaMA and its training step as one would write them in plain PyTorch, with no framework at all.

bf16 weights, fp32 masters, gradients cast to fp32 before they are clipped, fused AdamW, masters copied back: the arithmetic of a
mixed-precision run and nothing else. In fp32 the weights are their own masters. One device, one micro-batch a step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megastab.config.schema import ModelConfig


class BareBlock(nn.Module):
    """Pre-norm attention and gated MLP with separate projections."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        width, heads = model.hidden_size, model.num_heads
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width, model.norm_eps), nn.RMSNorm(width, model.norm_eps)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in "qkvo")
        self.gate, self.up = (nn.Linear(width, model.ffn_hidden_size, bias=False) for _ in range(2))
        self.down = nn.Linear(model.ffn_hidden_size, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        batch, seq, width = x.shape
        h = self.attention_norm(x)
        q, k, v = (p(h).view(batch, seq, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = _rope(q, cos, sin), _rope(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, seq, width)
        x = x + self.o(mixed)
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


class BareLlama(nn.Module):
    """Embedding, blocks, norm, untied head."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        assert model.vocab_size is not None
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.blocks = nn.ModuleList(BareBlock(model) for _ in range(model.num_layers))
        self.norm = nn.RMSNorm(model.hidden_size, model.norm_eps)
        self.head = nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        frequencies = model.rope_theta ** (-torch.arange(0, model.head_dim, 2).double() / model.head_dim)
        angles = torch.outer(torch.arange(model.max_seq_len).double(), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy, fp32."""
        x = self.embedding(tokens)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), labels.flatten())

    def canonical(self) -> dict[str, Tensor]:
        """Every weight under megastab's canonical name, as a view in megastab's shape (o and down are stored [in, D] there)."""
        out = {"embedding": self.embedding.weight, "final_norm": self.norm.weight, "head": self.head.weight}
        for i, block in enumerate(self.blocks):
            for name, weight in block.named_parameters():
                kind = name.removesuffix(".weight")
                home = "" if kind.endswith("norm") else "mlp." if kind in ("gate", "up", "down") else "attention."
                out[f"layers.{i}.{home}{kind}"] = weight.t() if kind in ("o", "down") else weight
        return {name: weight.data for name, weight in out.items()}


class BareLoop:
    """The network, its masters and AdamW; ``step`` is one training step."""

    def __init__(self, model: ModelConfig, lr: float, *, is_compiled: bool, dtype: torch.dtype, device: str = "cpu"):
        self.net = BareLlama(model).to(device, dtype)
        if is_compiled:
            for block in self.net.blocks:
                block.compile()
        self.weights: list[Tensor] = list(self.net.parameters())
        is_own_master = dtype == torch.float32
        self.masters = self.weights if is_own_master else [w.detach().float().requires_grad_() for w in self.weights]
        groups = [
            {"params": [m for m in self.masters if m.dim() > 1], "weight_decay": 0.1},
            {"params": [m for m in self.masters if m.dim() == 1], "weight_decay": 0.0},  # gains keep their scale
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)

    @torch.no_grad()
    def load(self, matrices: Mapping[str, Tensor]) -> None:
        """Start from these fp32 weights, by canonical name; every weight must be given."""
        for name, weight in self.net.canonical().items():
            weight.copy_(matrices[name])
        torch._foreach_copy_(self.masters, self.weights)

    def step(self, tokens: Tensor, labels: Tensor) -> float:
        """One step on [B, S] ids and targets; the loss before it."""
        loss = self.net(tokens, labels)
        loss.backward()
        if self.masters is not self.weights:
            for master, weight in zip(self.masters, self.weights, strict=True):
                assert weight.grad is not None
                master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.masters is not self.weights:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.masters)
        return float(loss.detach())
