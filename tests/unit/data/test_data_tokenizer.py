"""Nothing is lost between text and tokens; training is deterministic, bounded and explains itself."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from corpora import write_jsonl

from megastab.config.errors import UserError
from megastab.data import tokenizer_training
from megastab.data.documents import plan_units
from megastab.data.tokenizer import Tokenizer
from megastab.data.tokenizer_training import train_tokenizer

HARD_TEXTS = [
    "",
    " ",
    "  two  spaces   and trailing  ",
    "\tif x:\n\t\treturn\n\n\n    y = 1\r\n",
    "\u2581 is sentencepiece's own space \u2581\u2581 and \u2585 its unknown",
    "<eod> <unk> <0x41> are text, not pieces",
    "nul \0 and e\u0301 vs \u00e9, \ufb01, \u3000, \u00a0, \u2028",
    "\U0001f600 \u6f22\u5b57 \ue000",
]


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_round_trip_is_exact(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eod not in tokenizer.encode(text)


def test_round_trip_of_corpus_and_unigram(tokenizer: Tokenizer, corpus: Path, texts: list[str], tmp_path: Path) -> None:
    unigram = train_tokenizer([corpus], tmp_path / "unigram", 300, "unigram")
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert unigram.decode(unigram.encode(text)) == text


def test_runs_of_spaces_and_newlines_become_pieces(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(" " * 12)) <= 3
    assert any("\n" in tokenizer.decode([i]) and len(tokenizer.decode([i])) > 1 for i in range(tokenizer.vocab_size))


def test_end_of_document_is_a_piece_that_decodes_to_nothing(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a b")
    assert 0 <= tokenizer.eod < tokenizer.vocab_size == 400
    assert tokenizer.decode([*ids, tokenizer.eod]) == "a b"


def test_training_twice_gives_the_same_file_at_any_path(tokenizer: Tokenizer, corpus: Path, tmp_path: Path) -> None:
    again = train_tokenizer([corpus], tmp_path / "elsewhere" / "other_name", 400)
    assert again.fingerprint == tokenizer.fingerprint
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["other_name.model"]


def test_pickle_loads_the_same_model(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.encode("return self") == tokenizer.encode("return self")


@pytest.mark.parametrize(("vocab_size", "said"), [(50_000, "too large.*at most [0-9]+"), (100, "too small.*need [0-9]+")])
def test_impossible_vocab_size_says_the_possible_one(corpus: Path, tmp_path: Path, vocab_size: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        train_tokenizer([corpus], tmp_path / "t", vocab_size)
    assert not list(tmp_path.iterdir())


def test_empty_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match="hold no text"):
        train_tokenizer([tmp_path / "empty.txt"], tmp_path / "t", 300)


def test_not_a_model_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a SentencePiece"):
        Tokenizer(corpus)
    with pytest.raises(UserError, match="No such file"):
        Tokenizer(tmp_path / "none.model")


def test_foreign_model_ends_documents_with_its_own_piece(corpus: Path, tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(input=str(corpus), model_prefix=str(tmp_path / "m"), vocab_size=60, minloglevel=2)
    foreign = Tokenizer(tmp_path / "m.model")
    assert foreign.eod == 2  # </s>
    assert foreign.encode("\u2581 x")  # no byte pieces to fall back on, and no crash


def test_sample_is_bounded_and_spread_over_all_files(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", [name * 50] * 100) for name in "abc"]
    chunks = list(tokenizer_training._chunks(plan_units(paths), "text", 1000))
    assert {name: sum(chunk.count(name.encode()) for chunk in chunks) for name in "abc"} == {"a": 333, "b": 333, "c": 334}


def test_share_that_a_short_file_leaves_goes_to_the_others(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / "a.jsonl", ["a" * 900]), write_jsonl(tmp_path / "b.jsonl", ["b" * 10])]
    assert sum(map(len, tokenizer_training._chunks(plan_units(paths), "text", 500))) == 500


def test_long_documents_are_cut_after_newlines_and_never_inside_a_character() -> None:
    text = ("\u6f22" * 3000 + "\n" + "word " * 200 + "\n") * 3
    pieces = list(tokenizer_training._cut(text.encode()))
    assert b"".join(pieces).decode() == text
    assert max(map(len, pieces)) <= tokenizer_training._CHUNK_BYTES
    assert all(piece.decode() for piece in pieces)
