"""A run that starts from a Hugging Face model: its first loss and its masters are the model's, at every cut."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from megastab.checkpoint.hf_import import import_model
from megastab.checkpoint.init_from import check_fit, open_start
from megastab.config.errors import UserError
from megastab.config.load import load_config
from megastab.parallel.collectives import PeerFailed
from tests import jobs
from tests.hugging_face import VOCAB, a_model, save
from tests.layouts import GLOBAL_BATCH, SEQ, Layout, SyntheticSource, config_of
from tests.ranks import run_ranks
from tests.unit.checkpoint.test_checkpoint_resume import train


def first_step(config: dict[str, Any]) -> tuple[float, list[jobs.Piece]]:
    """On a rank: what it holds before the first step, and the first loss."""
    job = jobs.start(config)
    held = jobs.masters(job)
    loss = job.step()
    job.built.engine.destroy()
    return loss, held


@cache
def on_disk(name: str, dtype: str) -> tuple[Path, float]:
    """A model's folder, and its loss on the samples of the first step, on one process by transformers."""
    model = a_model(name, **({"n_positions": SEQ} if name == "gpt2" else {"max_position_embeddings": SEQ, "num_key_value_heads": 1}))
    folder = save(model.to(TORCH[dtype]), Path(tempfile.mkdtemp(prefix="hf-")))
    tokens = torch.from_numpy(np.stack([SyntheticSource()[i].tokens for i in range(GLOBAL_BATCH)]))
    with torch.no_grad():
        logits = model.float()(tokens[:, :-1]).logits
    return folder, float(F.cross_entropy(logits.reshape(-1, VOCAB), tokens[:, 1:].reshape(-1)))


def config_for(folder: Path, layout: Layout, dtype: str = "fp32", **changes: Any) -> dict[str, Any]:
    config = config_of(layout, "AdamW", dtype, run__init_from=str(folder))
    config["megastab"]["model"] = {**open_start(folder).model.model_dump(mode="json"), **changes}
    return config


TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16}
# fp32: sums in another order, of a loss near 5. bf16: its own rounding, 3 digits.
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}
CASES = {
    "a KV head of 2 ranks": ("llama 3", Layout(2, tp=2, sp=True), "fp32"),
    "tied over 2 stages": ("llama tied", Layout(2, pp=2, zero=1, accumulation=2), "fp32"),
    "pieces that cut rows": ("gpt2", Layout(3, zero=3), "fp32"),
    "bf16": ("gpt2", Layout(1, zero=1), "bf16"),
    "bf16 in pieces": ("llama 3", Layout(2, zero=3), "bf16"),
}


@pytest.mark.parametrize("name", CASES)
def test_first_loss_and_masters_are_the_models(name: str) -> None:
    """Masters are fp32, and so are the stored weights: also where the engine trains in bf16, no bit is lost."""
    model, layout, dtype = CASES[name]
    folder, expected = on_disk(model, "fp32")
    found = run_ranks(layout.world, first_step, config_for(folder, layout, dtype))
    assert all(abs(loss - expected) < TOLERANCE[dtype] for loss, _ in found), (found[0][0], expected)
    masters, drift = jobs.merge(pieces for _, pieces in found)
    source = open_start(folder).source
    assert drift == 0 and masters.keys() == set(source.names())
    for matrix, values in masters.items():
        whole = source.rows(matrix, 0, source.shape(matrix)[0]).float()
        assert np.array_equal(values, whole.reshape(-1).numpy()), matrix


def refusal(config: dict[str, Any]) -> tuple[str, str]:
    """On a rank: how starting fails."""
    try:
        jobs.start(config)
    except (UserError, PeerFailed) as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def test_weights_of_another_model_are_refused_once() -> None:
    folder, _ = on_disk("llama 3", "fp32")
    (first, said), (second, _) = run_ranks(2, refusal, config_for(folder, Layout(2, tp=2), hidden_size=64, vocab_size=90))
    assert (first, second) == ("UserError", "PeerFailed")
    assert "megastab.model.hidden_size = 32 there, 64 here, megastab.model.vocab_size = 100 there, 90 here" in said
    assert "set these keys to its values" in said


def test_rotary_context_and_dropout_may_differ() -> None:
    start = open_start(on_disk("llama 3", "fp32")[0])
    check_fit(start, start.model.model_copy(update={"max_seq_len": 4 * SEQ}))
    gpt = open_start(on_disk("gpt2", "bf16")[0])
    check_fit(gpt, gpt.model.model_copy(update={"dropout": 0.3}))
    with pytest.raises(UserError, match="megastab.model.max_seq_len = 16 there, 8 here"):
        check_fit(gpt, gpt.model.model_copy(update={"max_seq_len": 8}))


def test_import_and_directory_start_alike(tmp_path: Path) -> None:
    folder, _ = on_disk("gpt2", "bf16")
    made, direct = open_start(import_model(folder, tmp_path / "ours").folder), open_start(folder)
    assert made.model == direct.model and open_start(tmp_path / "ours" / "weights").model == direct.model
    assert set(made.source.names()) == set(direct.source.names())
    for name in direct.source.names():
        rows = direct.source.shape(name)[0]
        assert torch.equal(made.source.rows(name, 0, rows), direct.source.rows(name, 0, rows)), name
        assert torch.equal(made.source.rows(name, 1, rows - 1), direct.source.rows(name, 1, rows - 1)), name


class Settled(Exception):
    """What the trainer does after the build is not the question."""


def test_checkpoint_that_is_resumed_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights to start from may be gone by then: they are not looked for."""
    from megastab.engine import trainer

    def build(config: Any, grid: Any, is_new: bool) -> None:
        raise Settled(is_new)

    monkeypatch.setattr(trainer, "build", build)
    for origin, expected in ((None, True), (tmp_path, False)):
        monkeypatch.setattr(trainer.store, "find", lambda *args, found=origin: found)
        config = load_config(config_for(on_disk("llama 3", "fp32")[0], Layout(1)), world_size=1)
        config = replace(
            config, megastab=config.megastab.model_copy(update={"run": config.megastab.run.model_copy(update={"dir": str(tmp_path)})})
        )
        with pytest.raises(Settled) as raised:
            trainer.Trainer(config, None, SimpleNamespace(tokenizer=None))
        assert raised.value.args == (expected,)


def convert(*arguments: str) -> subprocess.CompletedProcess[str]:
    tool = Path(__file__).parents[3] / "tools" / "convert.py"
    return subprocess.run([sys.executable, str(tool), *arguments], capture_output=True, text=True)


def test_run_that_started_from_it_goes_back_by_the_tool(tmp_path: Path) -> None:
    """In, one step of bf16 on two ranks that share a KV head, out: transformers' logits are ours again."""
    folder, _ = on_disk("llama 3", "fp32")
    come = convert("import", str(folder), str(tmp_path / "ours"))
    assert come.returncode == 0 and "give it your data where it says FILL_IN" in come.stdout, come
    config = config_for(tmp_path / "ours", Layout(2, tp=2), "bf16")
    config["megastab"]["run"] |= {"dir": str(tmp_path / "run"), "total_steps": 1}
    run_ranks(2, train, config)
    go = convert("export", str(tmp_path / "run"), str(tmp_path / "back"), "--max-shard-size", "10KB")
    assert go.returncode == 0 and "llama, from" in go.stdout and "logits equal transformers'" in go.stdout, go
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    there, here = theirs.state_dict(), a_model("llama 3", num_key_value_heads=1).state_dict()
    assert there.keys() == here.keys() and all(tensor.dtype == torch.bfloat16 for tensor in there.values())
    moved = [float((there[name] - tensor.bfloat16()).abs().max()) for name, tensor in here.items()]
    assert 0 < max(moved) < 0.02, "a step of AdamW is of the size of its rate"
    again = convert("export", str(tmp_path / "run"), str(tmp_path / "back"))
    assert again.returncode == 1 and again.stderr.startswith("error: ") and "is there already" in again.stderr
