from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megastab.checkpoint.manifest import Manifest
from megastab.config.errors import UserError
from megastab.data.tokenizer import Tokenizer
from megastab.data.tokenizer_training import train_tokenizer
from megastab.engine.inference import find_checkpoint, load_for_inference, text_of, tokenizer_of
from megastab.model.generate import generate
from tests.ranks import run_ranks
from tests.unit.model_generate.tiny import VOCAB, tiny_model, write_checkpoint

ROOT = Path(__file__).parents[3]
PROMPT = [5, 17, 200, 3]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    text = ROOT / "megastab" / "config"
    corpus = tmp_path_factory.mktemp("tokenizer") / "corpus.txt"
    corpus.write_text("\n".join(path.read_text() for path in sorted(text.glob("*.py"))))
    return train_tokenizer([corpus], corpus.parent / "tokenizer", VOCAB)


@pytest.fixture(scope="module")
def run(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint written by two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("runs") / "tp2"
    overrides = {"megastab": {"parallel": {"tensor": 2}, "data": {"tokenizer": str(tokenizer.path)}}}
    run_ranks(2, write_checkpoint, str(folder), overrides, tokenizer.fingerprint)
    return folder


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({"megastab": {"parallel": {"pipeline": 2}}, "zero_optimization": {"stage": 1}}, id="pp2-zero1"),
        pytest.param({"zero_optimization": {"stage": 3}}, id="dp2-zero3"),
        pytest.param({"arch": "gpt", "megastab": {"parallel": {"pipeline": 2}}}, id="gpt-tied-pp2"),
    ],
)
def test_a_checkpoint_of_any_layout_samples_like_one_process(tmp_path: Path, overrides: dict[str, Any]) -> None:
    where = run_ranks(2, write_checkpoint, str(tmp_path / "run"), overrides)[0]
    model, config, tokenizer_path = load_for_inference(where)
    assert not model.training and tokenizer_path is None
    alone = tiny_model(overrides.get("arch", "llama"), draw_biases=False)
    assert generate(model, PROMPT, 10, temperature=0.9, seed=3) == generate(alone, PROMPT, 10, temperature=0.9, seed=3)
    assert config.model.vocab_size == VOCAB


@pytest.mark.parametrize(
    ("written", "edited", "said"),
    [
        ({}, {"norm": "dyt"}, r"lacks embedding_scale, final_norm.alpha, final_norm.bias, layers.0.attention_norm.alpha, "),
        ({"norm": "dyt"}, {"norm": "rmsnorm"}, r"holds embedding_scale, final_norm.alpha, .* which the model of its manifest has not"),
        ({"norm_position": "peri"}, {"norm_position": "reordered"}, r"holds layers.0.attention_norm, layers.0.mlp_norm"),
    ],
    ids=["dyt", "rmsnorm", "reordered"],
)
def test_weights_of_another_variant_are_refused(tmp_path: Path, written: dict[str, Any], edited: dict[str, Any], said: str) -> None:
    where = Path(run_ranks(1, write_checkpoint, str(tmp_path / "run"), {"model": written})[0])
    manifest = Manifest.read(where)
    load_for_inference(where)
    replace(manifest, model={**manifest.model, **edited}).write(where)
    with pytest.raises(UserError, match=said):
        load_for_inference(where)


def test_checkpoint_of_a_version_without_the_variants_samples(tmp_path: Path) -> None:
    where = Path(run_ranks(1, write_checkpoint, str(tmp_path / "run"), {})[0])
    manifest = Manifest.read(where)
    old = set(manifest.model) - {"dyt", "norm_position", "layer_norm_scaling", "embedding_norm", "embedding_multiplier", "logit_softcap"}
    replace(manifest, model={key: manifest.model[key] for key in old}).write(where)
    found = generate(load_for_inference(where).model, PROMPT, 5, temperature=0.0)
    assert found == generate(tiny_model(draw_biases=False), PROMPT, 5, temperature=0.0)


def test_tensor_parallel_weights_are_merged_exactly(run: Path) -> None:
    loaded = load_for_inference(find_checkpoint(run))
    for (name, mine), alone in zip(loaded.model.named_parameters(), tiny_model().parameters(), strict=True):
        torch.testing.assert_close(mine, alone, rtol=0, atol=0, msg=name)
    assert generate(loaded.model, PROMPT, 10, seed=3) == generate(tiny_model(), PROMPT, 10, seed=3)


def test_low_precision_weights_run_in_fp32_on_the_cpu(tmp_path: Path) -> None:
    where = run_ranks(1, write_checkpoint, str(tmp_path / "run"), {"bf16": {"enabled": True}})[0]
    model = load_for_inference(where).model
    expected = tiny_model()
    for mine, alone in zip(model.parameters(), expected.parameters(), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, alone.bfloat16().float(), rtol=0, atol=0)
    assert load_for_inference(where, torch.bfloat16).model.embedding.weight.dtype == torch.bfloat16


def test_the_tokenizer_must_be_the_one_trained_with(run: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(run)
    loaded = load_for_inference(checkpoint)
    assert tokenizer_of(checkpoint, loaded).fingerprint == tokenizer.fingerprint
    (tmp_path / "words.txt").write_text("one two three four five\n" * 300)
    other = train_tokenizer([tmp_path / "words.txt"], tmp_path / "other", 280)
    with pytest.raises(UserError, match="is not the one"):
        tokenizer_of(checkpoint, loaded._replace(tokenizer=Path(other.path)))
    with pytest.raises(UserError, match="give a SentencePiece"):
        tokenizer_of(checkpoint, loaded._replace(tokenizer=tmp_path / "gone.model"))
    with pytest.raises(UserError, match="without megastab.data.tokenizer"):
        tokenizer_of(checkpoint, loaded._replace(tokenizer=None))


def test_what_is_missing_is_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no finished checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(UserError, match="there are step00000003"):
        find_checkpoint(run, "step00000099")
    with pytest.raises(UserError, match="no checkpoint"):
        load_for_inference(run / "checkpoints" / "step00000099")
    moved = shutil.copytree(find_checkpoint(run), tmp_path / "alone" / "checkpoints" / "step00000003")
    with pytest.raises(UserError, match="config.json is missing"):
        load_for_inference(moved)


def test_text_comes_out_whole(tokenizer: Tokenizer) -> None:
    """A character the vocabulary lacks is several byte tokens; none is printed before its last."""
    text = "x = '\u6f22\u5b57\U0001f600'  # caf\u00e9"
    ids = tokenizer.encode(text)
    for cut in (1, 4):
        pieces = list(text_of(tokenizer, ids[:cut], ids[cut:]))
        assert tokenizer.decode(ids[:cut]) + "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    line = [sys.executable, "tools/sample.py", *arguments]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_the_command_prints_text_from_the_prompt_on(run: Path) -> None:
    done = command("--run", str(run), "--prompt", "def ", "--max-tokens", "8", "--top-k", "20", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def ") and len(done.stdout) > 6
    assert "step00000003: " in done.stderr


def test_the_command_tells_a_user_error_without_a_traceback(run: Path) -> None:
    done = command("--run", str(run), "--prompt", "def " * 200)
    assert done.returncode == 1
    assert "error: the prompt has" in done.stderr and "Traceback" not in done.stderr
