"""A Hugging Face ``tokenizer.json`` as the tokenizer of data: transformers' ids, nothing added, nothing found in the text."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from megastab.config.errors import UserError
from megastab.data.prepare import prepare
from megastab.data.sidecar import read_sidecar
from megastab.data.tokenizer import Tokenizer

TEXTS = ["", " a  b\n", "def f(x):\n\treturn x\r\n", "<|endoftext|> is text", "\u6f22\u5b57 \U0001f600 nul \0", "word " * 300]


def byte_level(texts: list[str], special: list[str], vocab_size: int = 320) -> tokenizers.Tokenizer:
    """What GPT-2 has, trained on the small corpus."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    return made


@pytest.fixture(scope="module")
def plain(texts: list[str]) -> tokenizers.Tokenizer:
    return byte_level(texts, ["<|endoftext|>"])


@pytest.fixture
def path(plain: tokenizers.Tokenizer, tmp_path: Path) -> Path:
    plain.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_is_exact_and_a_special_tokens_name_is_text(path: Path, text: str) -> None:
    tokenizer = Tokenizer(path)
    ids = tokenizer.encode(text)
    assert tokenizer.decode([*ids, tokenizer.eod]) == text
    assert tokenizer.eod not in ids
    assert tokenizer.encode(text.encode()) == ids


def test_batches_are_what_single_texts_are(path: Path, texts: list[str]) -> None:
    tokenizer = Tokenizer(path)
    batch = tokenizer.encode_batch([text.encode() for text in texts])
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]
    assert {ids.dtype for ids in batch} == {np.dtype(np.int32)}


def test_ids_are_those_of_transformers(path: Path, texts: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    ours = Tokenizer(path)
    assert [ours.encode(text) for text in texts] == [theirs.encode(text, add_special_tokens=False) for text in texts]


def test_padding_truncation_and_template_of_the_file_are_left_out(plain: tokenizers.Tokenizer, path: Path) -> None:
    other = tokenizers.Tokenizer.from_str(plain.to_str())
    other.enable_truncation(4)
    other.enable_padding(length=64)
    other.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    other.save(str(path.with_name("other.json")))
    ours, wrapped = Tokenizer(path), Tokenizer(path.with_name("other.json"))
    assert [ours.encode(text) for text in TEXTS] == [wrapped.encode(text) for text in TEXTS]
    assert ours.fingerprint != wrapped.fingerprint


def test_vocabulary_ends_behind_the_largest_id(path: Path, tmp_path: Path) -> None:
    assert Tokenizer(path).vocab_size == 320
    with_hole = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    with_hole.add_special_tokens(["</s>"])
    with_hole.save(str(tmp_path / "hole.json"))
    ours = Tokenizer(tmp_path / "hole.json")
    assert with_hole.get_vocab_size() == 3  # what the package calls the size
    assert ours.vocab_size == max(7, ours.eod) + 1


@pytest.mark.parametrize("name", ["<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>"])
def test_end_of_document_is_a_special_token(texts: list[str], tmp_path: Path, name: str) -> None:
    byte_level(texts, ["<pad>", name]).save(str(tmp_path / "t.json"))
    assert Tokenizer(tmp_path / "t.json").eod == 1


@pytest.mark.parametrize("wrap", [str, lambda name: {"content": name, "special": True}], ids=["string", "object"])
def test_end_of_document_may_be_named_beside_the_file(texts: list[str], tmp_path: Path, wrap: Any) -> None:
    byte_level(texts, ["<pad>", "<|im_end|>"]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"\['<pad>', '<\|im_end\|>'\] is <\|endoftext\|>.*tokenizer_config.json beside it.*eos_token"):
        _ = Tokenizer(tmp_path / "tokenizer.json").eod
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": wrap("<|im_end|>")}))
    assert Tokenizer(tmp_path / "tokenizer.json").eod == 1
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="tokenizer_config.json: not a JSON object"):
        _ = Tokenizer(tmp_path / "tokenizer.json").eod


def test_pickle_loads_the_same_file(path: Path) -> None:
    tokenizer = Tokenizer(path)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert (copy.fingerprint, copy.encode("return self")) == (tokenizer.fingerprint, tokenizer.encode("return self"))


def test_other_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match=r"config\.json: not a Hugging Face tokenizer\.json"):
        Tokenizer(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"No such file.*\.model.*tokenizer\.json"):
        Tokenizer(tmp_path / "none.json")


def test_data_is_prepared_with_it_by_several_workers(path: Path, corpus: Path, texts: list[str], tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokenizer = Tokenizer(path)
    prepare([corpus], tmp_path / "d", path, workers=2, unit_bytes=20_000)
    dataset = IndexedDataset(str(tmp_path / "d"))
    assert [dataset[number].tolist() for number in range(len(dataset))] == [[*tokenizer.encode(text), tokenizer.eod] for text in texts]
    sidecar = read_sidecar(str(tmp_path / "d"))
    assert sidecar is not None and (sidecar.tokenizer, sidecar.vocab_size) == (tokenizer.fingerprint, 320)
