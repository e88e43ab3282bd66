"""The tokenizer's files, both ways: what transformers makes of them are our ids."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceTrainer
from transformers import AutoTokenizer

from megastab.checkpoint.hf_export import export_model
from megastab.checkpoint.hf_import import import_model
from megastab.checkpoint.hf_tokenizer import FILES, export_tokenizer
from megastab.config.errors import UserError
from megastab.config.load import load_config
from megastab.data.tokenizer import Tokenizer
from megastab.data.tokenizer_training import train_tokenizer
from tests.hugging_face import a_model, save

TEXT = "def f(x):\n    return  x + 10\n\n\nclass  Longer:\n\tpass  # caf\u00e9 \u6f22\u5b57 \U0001f600\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text.txt").write_text(Path(__file__).read_text() * 3)
    return {kind: train_tokenizer([folder / "text.txt"], folder / kind, 400, kind) for kind in ("bpe", "unigram")}  # type: ignore[arg-type]


def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_transformers_reads_ours_as_we_do(models: dict[str, Tokenizer], tmp_path: Path) -> None:
    ours, folder = models["bpe"], out(tmp_path)
    ids, notes = export_tokenizer(Path(ours.path), 400, folder)
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    found = theirs(TEXT)["input_ids"]
    assert notes == [] and len(theirs) == 400 and len(found) > 40
    assert found == ours.encode(TEXT) and theirs.decode(found) == TEXT
    assert ids == {"bos_token_id": None, "eos_token_id": ours.eod, "pad_token_id": None} and theirs.eos_token_id == ours.eod


def test_model_that_knows_a_beginning_does_not_get_one(tmp_path: Path) -> None:
    """A foreign SentencePiece model, with <s>, </s> and a space before the first word, as LLaMA's."""
    (tmp_path / "text.txt").write_text(Path(__file__).read_text())
    settings = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2, "normalization_rule_name": "identity"}
    SentencePieceTrainer.train(input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "foreign"), **settings)
    ours, folder = Tokenizer(tmp_path / "foreign.model"), out(tmp_path)
    ids, _ = export_tokenizer(tmp_path / "foreign.model", 400, folder)
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    assert theirs("import json")["input_ids"] == ours.encode("import json") and ids["eos_token_id"] == 2
    assert (theirs.bos_token, theirs.eos_token, len(theirs)) == ("<s>", "</s>", 400)


def test_run_names_its_own(models: dict[str, Tokenizer], tmp_path: Path) -> None:
    folder = save(a_model("llama tied", vocab_size=400), tmp_path / "in")
    checkpoint = import_model(folder, tmp_path / "run" / "checkpoints" / "step00000001").folder
    written = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").unlink()
    (checkpoint / "megastab.json").write_text(json.dumps({"model": written["megastab"]["model"]}))
    named = {**written["megastab"], "data": {"tokenizer": models["bpe"].path}, "run": {"init_from": None}}
    (tmp_path / "run" / "config.json").write_text(json.dumps({"megastab": named}))
    back = export_model(checkpoint, tmp_path / "back").folder
    assert (back / "tokenizer.model").read_bytes() == Path(models["bpe"].path).read_bytes()


def test_unigram_model_is_written_for_sentencepiece_alone(models: dict[str, Tokenizer], tmp_path: Path) -> None:
    folder = out(tmp_path)
    _, (note,) = export_tokenizer(Path(models["unigram"].path), 400, folder)
    assert "is no BPE model" in note and [path.name for path in folder.iterdir()] == ["tokenizer.model"]


def test_tokenizer_of_another_size_or_place_is_refused(models: dict[str, Tokenizer], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 400 pieces, the model 100 tokens: give the run's own"):
        export_tokenizer(Path(models["bpe"].path), 100, out(tmp_path))
    with pytest.raises(UserError, match="no tokenizer .*gone.model: give the run's .model file"):
        export_tokenizer(tmp_path / "gone.model", 100, tmp_path / "out")


def test_import_brings_it_and_export_takes_it_back(models: dict[str, Tokenizer], tmp_path: Path) -> None:
    folder = save(a_model("llama tied", vocab_size=400, bos_token_id=None, eos_token_id=models["bpe"].eod), tmp_path / "in")
    export_tokenizer(Path(models["bpe"].path), 400, folder)
    (folder / "generation_config.json").unlink()
    made = import_model(folder, tmp_path / "ours")
    config = load_config(made.folder / "config.json", world_size=1)
    assert config.megastab.data.tokenizer == str(made.folder / "tokenizer" / "tokenizer.model")
    assert not any("tokenizer" in note for note in made.notes)
    back = export_model(made.folder, tmp_path / "back")
    for name in FILES:
        assert (folder / name).is_file() == (back.folder / name).is_file() or name == "generation_config.json"
    assert (back.folder / "tokenizer_config.json").read_bytes() == (folder / "tokenizer_config.json").read_bytes()
    assert json.loads((back.folder / "config.json").read_text())["eos_token_id"] == models["bpe"].eod
    assert AutoTokenizer.from_pretrained(back.folder)(TEXT)["input_ids"] == models["bpe"].encode(TEXT)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "has no tokenizer .*the weights alone are imported"),
        ({"tokenizer.json": b"{}"}, "no tokenizer.model: prepare the data with the model's own tokenizer"),
        ({"tokenizer.model": b"IQ== 0"}, "tokenizer.model is not a SentencePiece model"),
        ({"tokenizer.model": None}, "tokenizer.model has 400 pieces, the model 100 tokens"),
    ],
    ids=["none", "json", "tiktoken", "another size"],
)
def test_tokenizer_our_data_tools_cannot_use_is_told(
    files: dict[str, bytes | None], said: str, models: dict[str, Tokenizer], tmp_path: Path
) -> None:
    folder = save(a_model("gpt2"), tmp_path / "in")
    for name, content in files.items():
        (folder / name).write_bytes(Path(models["bpe"].path).read_bytes() if content is None else content)
    made = import_model(folder, tmp_path / "ours")
    assert load_config(made.folder / "config.json", world_size=1).megastab.data.tokenizer is None
    assert sum(re.search(said, note) is not None for note in made.notes) == 1
    back = export_model(made.folder, tmp_path / "back")
    assert all((back.folder / name).read_bytes() == (folder / name).read_bytes() for name in files)
    assert json.loads((back.folder / "generation_config.json").read_text())["eos_token_id"] == 1


def test_run_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    ids, (note,) = export_tokenizer(None, 100, out(tmp_path))
    assert "no tokenizer is exported; give one with --tokenizer" in note and set(ids.values()) == {None}
