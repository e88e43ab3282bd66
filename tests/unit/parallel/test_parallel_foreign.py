"""Names of foreign parameters: the table, what is added to it, and what a share of a matrix counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megastab.config.errors import UserError
from megastab.parallel import foreign
from megastab.parallel.grid import TensorParallel


@pytest.mark.parametrize(
    ("name", "role", "layer"),
    [
        ("model.layers.11.self_attn.q_proj.weight", "q", 11),
        ("model.layers.0.mlp.down_proj.weight", "down", 0),
        ("model.embed_tokens.weight", "embedding", None),
        ("lm_head.weight", "head", None),
        ("transformer.h.3.attn.c_attn.weight", None, 3),
        ("transformer.wpe.weight", "position", None),
        ("gpt_neox.layers.2.mlp.dense_h_to_4h.weight", "up", 2),
        ("blocks.5.fused_qkv.weight", None, 5),
        ("model.layers.1.self_attn.q_proj.lora_A.default.weight", None, 1),
        ("weight", None, None),
    ],
)
def test_table_of_names(name: str, role: str | None, layer: int | None) -> None:
    assert (foreign.role_of(name), foreign.layer_of(name)) == (role, layer)


def test_registered_patterns_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "_registered", [])
    foreign.register(r"\.query\.weight$", "q")
    foreign.register(r"gate_proj", "other")
    assert foreign.role_of("encoder.layer.0.query.weight") == "q" and foreign.role_of("layers.0.gate_proj.weight") == "other"
    assert foreign.without_role({"a.gate_proj.weight": nn.Parameter(torch.zeros(2, 2)), "a.norm": nn.Parameter(torch.zeros(2))}) == []
    with pytest.raises(UserError, match="role 'query'"):
        foreign.register("x", "query")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not a regular expression"):
        foreign.register("(", "q")


def test_tensor_parallel_shares_are_counted_whole() -> None:
    """Two tensor-parallel ranks: a sharded matrix is counted by both over twice the elements, a replicated one by the first."""
    sharded, copy = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(5, 3))
    sharded.tensor_model_parallel = True  # type: ignore[attr-defined]
    tp = TensorParallel(1, 2)
    info = foreign.foreign_info(sharded, "layers.0.q_proj.weight", tp)
    assert (info.name, info.parts[0].global_rows, info.parts[0].start, info.is_first_copy) == ("layers.0.q_proj", 8, 4, True)
    info = foreign.foreign_info(copy, "layers.0.o_proj.weight", tp)
    assert (info.parts[0].global_rows, info.is_first_copy, info.is_sharded) == (5, False, False)
