from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from megastab.analysis import perplexity as perplexity_module
from megastab.analysis.hugging_face import subject_of
from megastab.analysis.own_model import subject_of as own_subject
from megastab.analysis.perplexity import perplexity
from megastab.analysis.subject import Codec, Subject
from megastab.analysis.windows import text_windows
from megastab.config.errors import UserError
from megastab.data.index_file import token_dtype, write_index
from tests.unit.analysis.models import VOCAB, foreign_model
from tests.unit.model_generate.tiny import tiny_model


@pytest.fixture
def subject() -> Subject:
    """One token a character: its code less 30; BOS is 1."""
    found = subject_of(foreign_model(), "letters")
    found.codec = Codec(lambda text: [ord(c) - 30 for c in text], lambda ids: "".join(chr(i + 30) for i in ids), 1)
    return found


def texts(subject: Subject, windows: torch.Tensor) -> list[str]:
    return [subject.decode(row) for row in windows.tolist()]


def test_windows_are_whole_pieces_of_single_documents(subject: Subject, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("abcdefghij", "KLM", "nopqrst")))
    assert texts(subject, text_windows(subject, path, 2, 3)) == ["abc", "KLM"]
    assert texts(subject, text_windows(subject, path, 6, 3)) == ["abc", "KLM", "nop", "def", "qrs", "ghi"]


def test_bos_takes_the_first_place_and_the_text_stays(subject: Subject, tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("abcdefgh")
    with_bos = text_windows(subject, path, 2, 4, bos=True)
    assert with_bos[:, 0].tolist() == [1, 1] and texts(subject, with_bos[:, 1:]) == ["abc", "efg"]


def test_a_folder_and_token_ids_are_sources_too(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "c.png").write_bytes(b"\xff\xfe")
    assert texts(subject, text_windows(subject, tmp_path, 2, 5)) == ["first", "secon"]
    ids = np.array([5, 6, 7, 8, 9, 10], token_dtype(VOCAB))
    (tmp_path / "ids.bin").write_bytes(ids.tobytes())
    write_index(tmp_path / "ids.idx", np.array([4, 2]), ids.dtype)
    assert text_windows(subject, tmp_path / "ids", 3, 2).tolist() == [[5, 6], [9, 10], [7, 8]]


def test_every_window_of_a_text_is_there(subject: Subject, tmp_path: Path) -> None:
    text = "".join(chr(40 + i % 80) for i in range(600))
    (tmp_path / "some.txt").write_text(text)
    for seq, number in ((20, 30), (7, 85), (48, 12)):
        found = "".join(texts(subject, text_windows(subject, tmp_path / "some.txt", number, seq)))
        assert found == text[: number * seq]
        with pytest.raises(UserError, match=f"they make {number}"):
            text_windows(subject, tmp_path / "some.txt", number + 1, seq)


def test_a_long_text_is_tokenised_as_far_as_it_is_used(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("x" * 100_000)
    asked: list[int] = []
    encode = subject.encode
    subject.codec = Codec(lambda text: [asked.append(len(text)) or 7 for _ in text], lambda ids: "", 1)  # type: ignore[func-returns-value]
    assert text_windows(subject, tmp_path / "long.txt", 4, 16).shape == (4, 16)
    assert max(asked) <= 4 * 16 * 8, encode


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_windows": 3}, r"3 windows of 4 tokens asked, but of its 1 documents they make 2; lower --seq-len or --windows"),
        ({"seq_len": 20}, r"1 documents the longest has only 8 tokens"),
        ({"seq_len": 49}, r"--seq-len 49 is more than the 48 positions letters was built for"),
        ({"num_windows": 0}, r"--windows 0 and --seq-len 4 must be at least 1"),
        ({"source": "nowhere.txt"}, r"no such file or folder, and no .*nowhere.txt.idx"),
        ({"source": "bad.jsonl"}, r'line 2 is no JSON object with a "text"'),
        ({"source": "latin.txt"}, r"latin.txt cannot be read as UTF-8"),
        ({"source": "ids.bin"}, r"give the prefix, without .bin"),
        ({"source": "empty"}, r"no text files in this folder"),
        ({"source": "capital.txt"}, r"holds token id 8\d+, but letters has 96"),
    ],
)
def test_what_does_not_fit_is_an_error(subject: Subject, tmp_path: Path, changes: dict[str, object], said: str) -> None:
    (tmp_path / "some.txt").write_text("abcdefgh")
    (tmp_path / "bad.jsonl").write_text('{"text": "abcdefgh"}\n{"words": 1}\n')
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xe9\xe9")
    (tmp_path / "ids.bin").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "capital.txt").write_text("\u0370" * 8)
    asked = {"source": "some.txt", "num_windows": 2, "seq_len": 4, **changes}
    with pytest.raises(UserError, match=said):
        text_windows(subject, tmp_path / str(asked["source"]), int(str(asked["num_windows"])), int(str(asked["seq_len"])))


def test_no_bos_token_is_said(tmp_path: Path, subject: Subject) -> None:
    (tmp_path / "some.txt").write_text("abcdefgh")
    assert subject.codec is not None
    subject.codec = subject.codec._replace(bos=None)
    with pytest.raises(UserError, match="letters has no BOS token"):
        text_windows(subject, tmp_path / "some.txt", 1, 4, bos=True)


@pytest.mark.parametrize("chunk", [1 << 22, 100])
@pytest.mark.parametrize("make", [lambda: subject_of(foreign_model(), "theirs"), lambda: own_subject(tiny_model(), "ours")])
def test_perplexity_is_the_definitions(make: object, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity_module, "CHUNK_ELEMENTS", chunk)
    subject: Subject = make()  # type: ignore[operator]
    windows = torch.randint(3, 90, (5, 11))
    log_p = F.log_softmax(subject.logits(windows).double()[:, :-1], -1)
    loss = -log_p.gather(2, windows[:, 1:, None]).mean()
    assert perplexity(subject, windows, batch=2) == pytest.approx(math.exp(loss), rel=1e-6)  # fp32 logits: 1e-7 each, not a bias


def test_perplexity_beyond_fp64_is_infinite_and_of_one_token_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of(foreign_model(), "theirs")
    with pytest.raises(UserError, match="nothing to predict"):
        perplexity(subject, torch.ones(2, 1, dtype=torch.int64))
    subject.forward = lambda tokens: torch.nn.functional.one_hot(tokens, VOCAB).float() * 1e4
    assert perplexity(subject, torch.arange(3, 9).view(1, 6)) == math.inf
