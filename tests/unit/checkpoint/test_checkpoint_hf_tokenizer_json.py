"""An imported ``tokenizer.json`` is the run's tokenizer where its vocabulary is the model's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from megastab.checkpoint.hf_export import export_model
from megastab.checkpoint.hf_import import import_model
from megastab.data.tokenizer import Tokenizer
from tests.hugging_face import VOCAB, a_model, save


def with_tokenizer(folder: Path, size: int) -> Path:
    """A GPT-2 directory with a tokenizer of ``size`` words."""
    save(a_model("gpt2"), folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(number): number for number in range(size - 1)}, unk_token="0"))
    words.add_special_tokens(["<|endoftext|>"])
    words.save(str(folder / "tokenizer.json"))
    return folder


def named(folder: Path) -> str | None:
    tokenizer: str | None = json.loads((folder / "config.json").read_text())["megastab"]["data"]["tokenizer"]
    return tokenizer


def test_config_names_it_and_export_brings_it_back(tmp_path: Path) -> None:
    source = with_tokenizer(tmp_path / "in", VOCAB)
    made = import_model(source, tmp_path / "ours")
    path = named(made.folder)
    assert path == str(tmp_path / "ours" / "tokenizer" / "tokenizer.json")
    assert (Tokenizer(path).vocab_size, Tokenizer(path).eod) == (VOCAB, VOCAB - 1)
    back = export_model(tmp_path / "ours", tmp_path / "back").folder
    assert (back / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("is_other_kind", [False, True], ids=["alone", "beside a tokenizer.model of another kind"])
def test_unusable_ones_are_said_and_not_named(tmp_path: Path, is_other_kind: bool) -> None:
    folder = with_tokenizer(tmp_path / "in", VOCAB - 1)
    if is_other_kind:  # as Llama 3 has
        (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    made = import_model(folder, tmp_path / "ours")
    assert named(made.folder) is None
    text = "\n".join(made.notes)
    assert f"tokenizer.json has {VOCAB - 1} pieces, the model {VOCAB} tokens: megastab.data.tokenizer is null" in text
    assert ("not a SentencePiece" in text) is is_other_kind
