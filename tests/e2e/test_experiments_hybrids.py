"""The hybrids of docs/experiments: attention written out is the model's own, and the page comes from its figures."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HYBRID_MODULES = ("hybrids", "attention_shares", "hybrid_pictures", "pictures", "small_runs")


@pytest.fixture
def hybrids(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """docs/experiments/hybrids.py."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "experiments"))
    for name in HYBRID_MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("hybrids")
    for name in HYBRID_MODULES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("sink", ["none", "kv_bias"])
def test_the_written_out_attention_is_the_model_s_own(hybrids: Any, sink: str) -> None:
    """Its weights times the values are what the model's attention gives; the counted first share is theirs."""
    import torch
    from attention_shares import shares, shares_by_layer, weights

    from megastab.config.schema import Megastab
    from megastab.model import attention
    from megastab.model.init import init_weights
    from megastab.model.transformer import Transformer

    shape = {"arch": "llama", "num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 48, "sink": sink}
    config = Megastab.model_validate(
        {
            "model": {**shape, "max_seq_len": 16, "vocab_size": 128, "init": {"scheme": "normal", "std": 0.5}},
            "data": {"train": [[1.0, "nowhere"]]},
            "run": {"dir": "nowhere", "total_steps": 1},
        }
    )
    model = Transformer(config)
    init_weights(model, config.model, seed=3)
    model.eval()
    if sink == "kv_bias":  # large enough to be seen
        draw = torch.Generator().manual_seed(4)
        for block in model.blocks:
            torch.nn.init.normal_(block.attention.sink.weight, generator=draw)
    plain, seen = attention.attend, []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *more: Any) -> torch.Tensor:
        out = plain(q, k, v, *more)
        bias = model.blocks[len(seen)].attention.sink(q) if sink == "kv_bias" else (None, None)
        over_keys, over_bias = weights(q, k, bias[0])
        made = over_keys @ v.transpose(1, 2).repeat_interleave(2, 1)
        if over_bias is not None:
            made = made + over_bias[..., None] * bias[1].repeat_interleave(2, 0)[:, None]
        torch.testing.assert_close(made.transpose(1, 2), out, rtol=0, atol=1e-5)  # fp32 sums of 16
        seen.append(shares(over_keys, over_bias))
        return out

    tokens = torch.randint(128, (3, 16), generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(attention, "attend", attend)
        model.logits(tokens)
    assert shares_by_layer(model, tokens) == seen and len(seen) == 2
    assert attention.attend is plain and all((x["bias"] > 0.01) == (sink == "kv_bias") for x in seen), seen


def test_attention_that_looks_everywhere_alike_gives_the_first_token_its_uniform_share(hybrids: Any) -> None:
    import torch
    from attention_shares import shares, uniform, weights

    q, k = torch.zeros(2, 4, 6, 8), torch.randn(2, 4, 2, 8, generator=torch.Generator().manual_seed(1))
    found = shares(*weights(q, k))
    assert found["first"] == pytest.approx(uniform(4)) == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3) and found["bias"] == 0.0
    found = shares(*weights(q, k, torch.ones(2, 8)))  # one key more for every query
    assert found["first"] == found["bias"] == pytest.approx((1 / 3 + 1 / 4 + 1 / 5) / 3)
    assert found["first_of_keys"] == pytest.approx(uniform(4))
    q, k = torch.ones(1, 4, 1, 8), torch.zeros(1, 4, 1, 8)
    k[:, 0] = 1.0  # all look at the first key, those that see a stronger bias at that
    assert shares(*weights(q, k))["first_wins"] == 1.0
    assert shares(*weights(q, k, torch.full((1, 8), 2.0)))["first_wins"] == 0.0
    k[:, 2] = 2.0  # the last two of the three queries that count see it
    assert shares(*weights(q, k))["first_wins"] == pytest.approx(1 / 3)


def test_a_block_is_massive_by_size_and_by_ratio(hybrids: Any) -> None:
    layers = {"largest": [99.0, 101.0, 101.0, 500.0], "median": [0.01, 1.0, 0.1, 0.501]}
    assert hybrids.massive_blocks(layers) == (3, 2, 1)


def test_every_hybrid_is_the_config_it_is_called(hybrids: Any) -> None:
    from megastab.config.load import load_config

    for hybrid in hybrids.CELLS:
        run = hybrids.training_run(hybrid, 2e-3, 2, 40, "nowhere")
        _, script, _, path, *overrides = run.command
        config = load_config(ROOT / path, overrides, world_size=1)
        model, stability = config.megastab.model, config.megastab.stability
        assert script == "megastab/pretrain.py" and (model.sink == "kv_bias", model.norm == "dyt") == ("kv_bias" in hybrid, "dyt" in hybrid)
        assert (stability.tvr is not None) == ("tvr" in hybrid) and config.deepspeed["optimizer"]["params"]["lr"] == 2e-3
        assert (config.megastab.run.seed, config.megastab.run.total_steps, config.megastab.run.save_interval) == (2, 40, 10)
        assert ROOT / config.megastab.run.dir == run.folder and model.init.std == (0.08 if "init .08" in hybrid else 0.024)
        assert model.embedding_multiplier == (11.3 if "x 11.3" in hybrid else 1.0)
    assert len({hybrids.training_run(h, r, 1, 40, "nowhere").name for h in hybrids.CELLS for r in hybrids.FULL_RATES}) == 27


def test_the_page_of_the_hybrids_comes_from_its_figures(hybrids: Any) -> None:
    """The page's rows, made again from the JSON beside it."""
    folder = ROOT / "docs" / "experiments"
    published, page = json.loads((folder / "hybrids.json").read_text()), (folder / "hybrids.md").read_text()
    page = page.split("<!-- table -->")[1].split("<!-- end of table -->")[0]
    assert published["lr"] == hybrids.RATE and list(published["hybrids"]) == list(hybrids.CELLS)
    for hybrid, each in published["hybrids"].items():
        assert len(each) == (2 if hybrid in hybrids.HYBRIDS else 1) and all(list(x["course"])[-1] == str(hybrids.STEPS) for x in each)
        line = next(line for line in page.splitlines() if line.startswith(f"| {hybrid} |"))
        there = [value.strip() for value in line.strip("| ").split(" | ")]
        made = hybrids.row(hybrid, each)
        assert len(made) == len(there) == len(hybrids.HEADER)
        for mine, shown in zip(made[1:], there[1:], strict=True):
            for one, other in zip(re.findall(r"[-\d.]+", mine), re.findall(r"[-\d.]+", shown), strict=True):
                if one == "-":
                    assert other == "-"
                else:
                    assert float(one) == pytest.approx(float(other), rel=2e-3, abs=2e-4), "five digits are kept"
