"""docs/experiments: bad batches change the right samples and no other; what is measured of activations, on states whose answer is known."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
BATCH, SEQ, VOCAB = 4, 32, 512
MODULES = ("poison", "rotation", "hidden_states", "rounding", "pictures", "small_runs")


@pytest.fixture(autouse=True)
def _experiments_on_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "experiments"))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("seed", [1, 2])
def test_poison_changes_the_samples_of_the_chosen_steps_and_no_other(text_data: Path, tmp_path: Path, seed: int) -> None:
    from poison import poison

    from megastab.data.blend import open_blend

    target = tmp_path / "text_train"
    poison(text_data / "text_train", target, {3: "noise", 7: "repeat"}, batch=BATCH, seq_len=SEQ, seed=seed, vocab_size=VOCAB)
    clean, bad = (open_blend([(1.0, str(prefix))], SEQ, seed) for prefix in (text_data / "text_train", target))
    chosen = {3: range(8, 12), 7: range(24, 28)}  # a step of four samples, counted from 1
    for sample in range(clean.first_epoch_samples):
        before, after = clean[sample].tokens, bad[sample].tokens
        changed = np.flatnonzero(before != after)
        if sample in chosen[3]:
            assert len(changed) > 0.8 * (SEQ - 1) and changed[0] > 0 and changed[-1] < SEQ, f"sample {sample}"
        elif sample in chosen[7]:
            assert set(after[1:-1]) == {bad[24].tokens[1]} and after[0] == before[0] and after[-1] == before[-1], f"sample {sample}"
        else:
            assert not len(changed), f"sample {sample} changed too"


def test_poison_refuses_a_sample_that_would_come_twice(text_data: Path, tmp_path: Path) -> None:
    from poison import poison

    with pytest.raises(ValueError, match="beyond the first epoch"):
        poison(text_data / "text_train", tmp_path / "text_train", {10**6: "noise"}, batch=BATCH, seq_len=SEQ, seed=1, vocab_size=VOCAB)


@pytest.fixture
def model() -> torch.nn.Module:
    """Two blocks of width 32 with weights large enough that blocks change the stream."""
    from megastab.config.schema import Megastab
    from megastab.model.init import init_weights
    from megastab.model.transformer import Transformer

    shape = {"arch": "llama", "num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_seq_len": 16, "vocab_size": 128}
    config = Megastab.model_validate(
        {
            "model": {**shape, "num_kv_heads": 4, "ffn_hidden_size": 48, "init": {"scheme": "normal", "std": 0.3}},
            "data": {"train": [[1.0, "nowhere"]]},
            "run": {"dir": "nowhere", "total_steps": 1},
        }
    )
    network = Transformer(config)
    init_weights(network, config.model, seed=3)
    return network.eval()


def tokens(samples: int, seq: int = 16) -> torch.Tensor:
    """[samples, seq] ids."""
    return torch.randint(128, (samples, seq), generator=torch.Generator().manual_seed(samples))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, -1.0, 1.0, -1.0], 1.0),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 1.7),
        ([0.0] * 7 + [8.0], 6.1428571),
        ([0.0] * 63 + [1.0], 62.0158730),
        ([2.0] * 4, float("nan")),
    ],
)
def test_kurtosis_is_population_raw_and_of_one_token(values: list[float], expected: float) -> None:
    from hidden_states import kurtosis

    with_another = torch.tensor([values, list(range(len(values)))])
    assert float(kurtosis(with_another)[0]) == pytest.approx(expected, rel=1e-7, nan_ok=True)


def test_the_first_token_of_every_sample_is_apart_from_the_rest() -> None:
    from hidden_states import statistics

    width, seq = 64, 4
    x_TD = torch.ones(2 * seq, width)
    x_TD[:, ::2] = -1.0  # kurtosis 1
    x_TD[::seq] = 0.0
    x_TD[0, 5], x_TD[seq, 7] = 300.0, -100.0  # one channel alone
    x_TD[6] = 0.0  # a token of equal channels has no kurtosis and is left out
    found = statistics(x_TD, seq)
    assert found["kurtosis_first"] == pytest.approx(width - 2 + 1 / (width - 1)) and found["kurtosis_rest"] == pytest.approx(1.0)
    assert found["size_first"] == 200.0 and found["size_rest"] == pytest.approx(5 / 6)
    assert found["largest"] == 300.0 and found["median"] == 1.0


def test_an_outlier_along_one_channel_vanishes_in_a_random_basis() -> None:
    from hidden_states import random_basis, statistics

    q_DD = random_basis(128)
    assert (q_DD @ q_DD.T - torch.eye(128, dtype=torch.float64)).abs().max() < 1e-12
    x_TD = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    x_TD[:, 17] += 40.0
    found = statistics(x_TD, 8)
    assert found["kurtosis_rest"] > 60
    assert found["kurtosis_turned"] < 5  # one draw of 128 Gaussian numbers, 2.95 in the mean


def test_the_shared_axes_are_those_of_the_optimizer_s_moments(tmp_path: Path) -> None:
    import rotation

    from megastab import OrthoAdam

    def axes(**params: object) -> torch.Tensor | None:
        config = {"optimizer": {"params": {"seed": 5, **params}}, "megastab": {"model": {"hidden_size": 16}}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return rotation.shared_axes(tmp_path)

    assert axes() is None and axes(rotation="hadamard") is None and axes(rotation="haar", haar_per="parameter") is None
    weight = torch.nn.Parameter(torch.zeros(3, 16))
    weight.grad = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    optimizer = OrthoAdam([("a matrix", weight)], rotation="haar", seed=5)
    optimizer.step()
    basis_DD = axes(rotation="haar")
    assert basis_DD is not None
    moments = optimizer.state[weight]["exp_avg"].view(3, 16)
    torch.testing.assert_close(moments.double() / 0.1, weight.grad.double() @ basis_DD, rtol=0, atol=1e-5)  # fp32 sums of 16


def test_layers_are_the_residual_stream_behind_the_embedding_and_every_block(model: torch.nn.Module) -> None:
    from hidden_states import statistics, statistics_by_layer

    from megastab.model.context import Context

    ids = tokens(3)
    found = statistics_by_layer(model, ids)
    with torch.no_grad():
        x_TD, context = model.embedding(ids.reshape(-1)), Context(*ids.shape)
        expected = [x_TD, *(x_TD := block(x_TD, context) for block in model.blocks)]
    assert found == [statistics(x_TD, ids.shape[1]) for x_TD in expected]
    assert len(found) == 3 and len({layer["median"] for layer in found}) == 3
    assert not any(m._forward_hooks for m in model.modules()), "hooks are taken off again"


def test_weights_are_rounded_by_output_channel_whichever_way_they_are_stored(model: torch.nn.Module) -> None:
    from rounding import largest_inputs, matrices, rounded

    before = [matrix.weight.clone() for matrix in matrices(model)]
    four = rounded(model, "W4", largest_inputs(model, tokens(2)))
    assert len(before) == 8 and all(torch.equal(old, m.weight) for old, m in zip(before, matrices(model), strict=True))
    for number, matrix in enumerate(matrices(four)):
        channels = matrix.weight if number % 2 == 0 else matrix.weight.t()  # qkv, o, up, down: o and down are stored [in, out]
        levels = [len(row.unique()) for row in channels]
        assert max(levels) <= 16 and min(levels) > 8, "16 values in each output channel"
        assert len(matrix.weight.unique()) > 100, "and others in every channel"
    assert torch.equal(four.head.weight, model.head.weight) and torch.equal(four.embedding.weight, model.embedding.weight)


def test_inputs_are_rounded_on_the_calibrated_scale(model: torch.nn.Module) -> None:
    from rounding import largest_inputs, matrices, rounded

    limits = largest_inputs(model, tokens(2))
    narrow = [limit / 2 for limit in limits]
    for kind, values in (("W8A8", 255), ("W4A4", 15)):
        quantised, seen = rounded(model, kind, narrow), []
        matrix = matrices(quantised)[1]
        matrix.register_forward_pre_hook(lambda _m, inputs, seen=seen: seen.append(inputs[0]))  # after the rounding one
        with torch.no_grad():
            quantised.logits(tokens(2))
        assert float(seen[0].abs().max()) == pytest.approx(float(narrow[1])), "what lies beyond the scale is cut"
        assert 8 < len(seen[0].unique()) <= values


def test_more_bits_cost_less(model: torch.nn.Module) -> None:
    from rounding import largest_inputs, rounded

    ids = tokens(8)
    limits = largest_inputs(model, ids)
    with torch.no_grad():
        plain = model.logits(ids)
        errors = {kind: float((rounded(model, kind, limits).logits(ids) - plain).norm()) for kind in ("W8A8", "W4", "W4A8", "W4A4")}
    assert errors["W8A8"] < errors["W4"] < errors["W4A4"] and errors["W8A8"] < errors["W4A8"] < errors["W4A4"]


def test_every_cell_is_the_optimizer_and_norm_it_is_called() -> None:
    import rotation
    from small_runs import CONFIG

    from megastab.config.load import load_config

    places = set()
    for cell in rotation.FULL_CELLS:
        optimizer, norm = cell.split("; ")
        run = rotation.training_run(cell, 1e-3, 2, 40, "nowhere", ("megastab.run.log_interval=7",))
        config = load_config(ROOT / CONFIG, run.overrides, world_size=1)
        chosen = config.deepspeed["optimizer"]
        assert config.megastab.model.norm == {"RMSNorm": "rmsnorm", "scalar gain": "rmsnorm_scalar"}[norm]
        assert chosen["params"]["lr"] == 1e-3 and config.megastab.run.seed == 2 and config.megastab.run.log_interval == 7
        if optimizer == "AdamW":
            assert chosen["type"] == "AdamW" and "rotation" not in chosen["params"]
        else:
            kind, axes = optimizer.split(", ")
            asked = [chosen["params"].get(key) for key in ("rotation", "haar_per", "axes", "max_axis", "seed")]
            per, longest = "parameter" if kind.endswith("per matrix") else None, 1024 if axes.endswith("but vocabulary") else None
            assert chosen["type"] == "OrthoAdam" and asked == [kind.split()[0], per, axes.split()[0], longest, 2]
        places.add(run.name)
    assert len(places) == len(rotation.FULL_CELLS) == 14


def test_the_published_table_comes_from_the_published_figures() -> None:
    """The page's rows, made again from the JSON beside it."""
    import rotation

    folder = ROOT / "docs" / "experiments"
    published, page = json.loads((folder / "rotation.json").read_text()), (folder / "rotation.md").read_text()
    assert list(published["cells"]) == list(rotation.CELLS)
    for cell, each in published["cells"].items():
        made = rotation.row(cell, each)
        line = next(line for line in page.splitlines() if line.startswith(f"| {cell} |"))
        there = [value.strip() for value in line.strip("| ").split(" | ")]
        assert len(made) == len(there) == len(rotation.HEADER)
        for mine, shown in zip(made[1:], there[1:], strict=True):
            if "-" in (mine, shown):
                assert mine == shown
                continue
            for one, other in zip(mine.strip("*").split(" / "), shown.strip("*").split(" / "), strict=True):
                assert float(one) == pytest.approx(float(other), rel=2e-3, abs=2e-4), "five digits are kept"
