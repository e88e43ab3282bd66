"""What is compiled where parameters are partitioned: nothing that calls a module with parameters."""

from __future__ import annotations

from typing import Any

import pytest

from megastab.engine.build import compile_blocks
from tests.layouts import LLAMA
from tests.oracle.models import build


@pytest.mark.parametrize(
    ("variant", "is_compiled"),
    [({}, True), ({"sink": "softmax1", "output_gate": "head"}, True), ({"sink": "learned"}, False), ({"qk_norm": "head"}, False)],
    ids=["plain", "softmax1", "learned", "qk_norm"],
)
def test_mix_is_compiled_where_it_holds_no_parameters(variant: dict[str, Any], is_compiled: bool) -> None:
    model = build({**LLAMA, **variant})
    compile_blocks(model, is_partitioned=True)
    assert all(("mix" in block.attention.__dict__) == is_compiled for block in model.blocks)
    assert all("activate" in block.mlp.__dict__ for block in model.blocks)
