"""The yardstick of the bench: LLaMA and its training step as one would write them in plain PyTorch, with no framework at all.

bf16 weights, fp32 masters, gradients cast to fp32 before they are clipped, fused AdamW, masters copied back: the arithmetic of a
mixed-precision run and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megastab.config.schema import ModelConfig


class BareBlock(nn.Module):
    """Pre-norm attention and gated MLP with separate projections."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        width, heads = model.hidden_size, model.num_heads
        self.heads, self.theta = heads, model.rope_theta
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


def bare_step(model: ModelConfig, lr: float, is_compiled: bool, dtype: torch.dtype = torch.bfloat16) -> Callable[[Tensor, Tensor], float]:
    """A function that takes one training step on (tokens, labels) and returns the loss."""
    torch.manual_seed(0)
    net = BareLlama(model).to(dtype)
    if is_compiled:
        for block in net.blocks:
            block.compile()
    weights = list(net.parameters())
    masters = [w.detach().float().clone().requires_grad_() for w in weights]
    optimizer = torch.optim.AdamW(masters, lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(tokens: Tensor, labels: Tensor) -> float:
        loss = net(tokens, labels)
        loss.backward()
        for master, weight in zip(masters, weights, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(tuple(weights), tuple(masters))
        return float(loss)

    return step
