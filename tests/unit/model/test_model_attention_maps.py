"""What attention is said to weigh is what it computes with: the maps times the values give the module's output, with every variant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megastab.model.attention import Attention
from megastab.model.attention_maps import attention_maps
from megastab.model.block import Block
from megastab.model.context import Context
from megastab.model.sinks import KVBias
from tests.unit.model_generate.tiny import tiny_model

VARIANTS: list[dict[str, Any]] = [
    {},
    {"arch": "gpt"},
    {"qk_norm": "head"},
    {"qk_norm": "full"},
    {"sink": "softmax1"},
    {"sink": "learned"},
    {"sink": "kv_bias"},
    {"sink": "kv_bias", "qk_norm": "head", "attention_softcap": 2.0},
    {"sink": "learned", "attention_softcap": 2.0},
    {"attention_softcap": 2.0},
    {"output_gate": "head"},
    {"output_gate": "element", "sink": "softmax1"},
]


def output(attention: Attention, x_TD: Tensor, context: Context) -> Tensor:
    """What the maps say the module gives: values weighed, gated, multiplied by o."""
    projected = attention.project(x_TD)
    gate = projected[0][:, projected[0].shape[1] - attention.gates :]
    projected = (projected[0][:, : projected[0].shape[1] - attention.gates], *projected[1:])
    v_BKSH = attention.heads(projected, context)[2].transpose(1, 2)
    repeats = attention.num_heads // attention.num_kv_heads
    maps = attention_maps(attention, x_TD, context)
    out = maps @ v_BKSH.repeat_interleave(repeats, 1)
    if isinstance(attention.sink, KVBias):
        out += (1.0 - maps.sum(-1, keepdim=True)) * attention.sink(x_TD)[1].repeat_interleave(repeats, 0)[:, None]
    out_TX = out.transpose(1, 2).flatten(0, 1).flatten(1)
    if attention.gates:
        out_TX = (out_TX.unflatten(1, (gate.shape[1], -1)) * gate.sigmoid().unsqueeze(-1)).flatten(1)
    return attention.o(out_TX)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())) or "llama")
@torch.no_grad()
def test_maps_times_values_are_the_modules_output(variant: dict[str, Any]) -> None:
    arch, changes = variant.get("arch", "llama"), {k: v for k, v in variant.items() if k != "arch"}
    block = tiny_model(arch, **changes).eval().blocks[1]
    assert isinstance(block, Block)
    x_TD, context = torch.randn(2 * 9, 32, generator=torch.Generator().manual_seed(1)), Context(2, 9)
    maps = attention_maps(block.attention, x_TD, context)
    assert maps.shape == (2, 4, 9, 9) and not maps.triu(1).any()
    # fp32 sums in another order
    torch.testing.assert_close(output(block.attention, x_TD, context), block.attention(x_TD, context), rtol=1e-4, atol=1e-5)
    has_sink = variant.get("sink", "none") != "none"
    lacks = 1.0 - maps.sum(-1)
    assert bool((lacks > 1e-4).all()) if has_sink else bool((lacks.abs() < 1e-5).all())
