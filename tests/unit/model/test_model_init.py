"""Initial weights: the table of ``init.py``, role by role, and padding rows of zero."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from megastab.model.init import init_weights, weight_std
from megastab.parallel.param_info import ParamInfo, Part, describe
from tests.layouts import GPT, LLAMA
from tests.oracle.models import build, logical

WIDE = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 256, "vocab_size": 500}


@pytest.mark.parametrize("scheme", ["normal", "residual_scaled", "lir"])
@pytest.mark.parametrize("base", [LLAMA, GPT], ids=["llama", "gpt"])
def test_std_of_every_matrix_follows_the_table(base: dict, scheme: str) -> None:
    model = build({**base, **WIDE, "init": {"scheme": scheme, "std": 0.05}})
    init_weights(model, model.config, 1)
    for name, values in logical(model).items():
        role = name.split(".")[-1]
        layer = int(name.split(".")[1]) + 1 if name.startswith("layers.") else None
        if role == "bias":
            assert not values.any(), name
        elif "norm" in role:
            assert (values == 1).all(), name
        else:
            std = 0.05
            if layer is not None and scheme == "lir":
                std /= math.sqrt(layer)
            if scheme == "residual_scaled" and role in ("o", "down"):
                std /= math.sqrt(2 * 4)
            real = values[:500] if name in ("embedding", "head") else values
            assert float(real.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * real.numel())), name  # five sigma
            assert abs(float(real.mean())) < 5 * std / math.sqrt(real.numel()), name


def test_a_scale_starts_at_what_its_part_says() -> None:
    held = nn.Parameter(torch.full((3,), torch.nan))
    describe(held, ParamInfo((Part.whole("a", "scale", 1, 0.25), Part.whole("b", "scale", 2, 8.0))))
    config = build(LLAMA).config
    init_weights(nn.ParameterList([held]), config, 1)
    assert held.tolist() == [0.25, 8.0, 8.0]
    with pytest.raises(AssertionError, match="c does not say what it starts at"):
        init_weights(nn.ParameterList([describe(nn.Parameter(torch.ones(1)), ParamInfo((Part.whole("c", "scale", 1),)))]), config, 1)


def test_padding_rows_start_at_zero() -> None:
    model = build({**LLAMA, "vocab_size": 130})
    init_weights(model, model.config, 1)
    for name in ("embedding", "head"):
        values = logical(model)[name]
        assert values.shape[0] == 256 and values[:130].any(1).all() and not values[130:].any()


def test_weights_depend_on_seed_and_name_only() -> None:
    def drawn(seed: int, **changes: object) -> dict[str, torch.Tensor]:
        model = build({**LLAMA, **changes})
        init_weights(model, model.config, seed)
        return logical(model)

    first, again, other, deeper = drawn(1), drawn(1), drawn(2), drawn(1, num_layers=3)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embedding"], other["embedding"])
    assert all(torch.equal(first[name], deeper[name]) for name in first), "a block more changes no other block"
    assert not torch.equal(first["layers.0.attention.q"], first["layers.0.attention.k"])


def test_std_outside_the_blocks_ignores_the_scheme() -> None:
    config = build({**LLAMA, "init": {"scheme": "lir", "std": 0.3}}).config
    assert weight_std("embedding", None, config) == weight_std("head", None, config) == weight_std("position", None, config) == 0.3
    assert weight_std("q", 3, config) == 0.15


def test_gates_follow_the_table_and_sinks_their_own() -> None:
    wide = {**LLAMA, **WIDE, "output_gate": "element", "init": {"scheme": "lir", "std": 0.05}}
    model, other = (build({**wide, "sink": kind}) for kind in ("kv_bias", "learned"))
    for network in (model, other):
        init_weights(network, network.config, 1)
    found = logical(model)
    for layer in range(4):
        gate, key, value = (found[f"layers.{layer}.attention.{x}"] for x in ("output_gate", "sink_key", "sink_value"))
        assert float(gate.std()) == pytest.approx(0.05 / math.sqrt(layer + 1), rel=5 / math.sqrt(2 * gate.numel()))
        assert not torch.equal(key, value)
        for drawn in (key, value):
            assert float(drawn.square().mean().sqrt()) == pytest.approx(0.02, rel=5 / math.sqrt(2 * drawn.numel()))
        assert not logical(other)[f"layers.{layer}.attention.sink"].any()
