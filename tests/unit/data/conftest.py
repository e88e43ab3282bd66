"""A small corpus, a tokenizer trained on it, and datasets of numbers that no tokenizer made."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from corpora import write_jsonl

from megastab.data.indexed import TokenFile
from megastab.data.tokenizer import Tokenizer
from megastab.data.tokenizer_training import train_tokenizer


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """A few hundred code-like documents of very different lengths."""
    draw = random.Random(0)
    words = ["def", "return", "self", "value", "in", "for", "not", "None", "print", "yield", "import", "x", "y", "z", "alpha", "beta"]
    words += ["3.14", "\u00e9t\u00e9", "\u6f22\u5b57"]

    def line() -> str:
        return "    " * draw.randrange(4) + " ".join(draw.choice(words) for _ in range(draw.randrange(1, 9))) + draw.choice(("", ":"))

    return ["\n".join(line() for _ in range(draw.choice((1, 3, 60)))) + "\n" for _ in range(300)]


@pytest.fixture(scope="session")
def corpus(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", texts)


@pytest.fixture(scope="session")
def tokenizer(corpus: Path) -> Tokenizer:
    return train_tokenizer([corpus], corpus.parent / "tokenizer", 400)


@pytest.fixture
def numbered() -> Callable[..., TokenFile]:
    """A dataset in memory whose token at place p of document d is 1000 d + p, so that a token tells where it came from."""

    def make(lengths: list[int], prefix: str = "memory") -> TokenFile:
        tokens = np.concatenate([1000 * number + np.arange(length) for number, length in enumerate(lengths)]).astype(np.int32)
        ends = np.cumsum(lengths)
        return TokenFile(prefix, tokens, ends - lengths, np.asarray(lengths))

    return make
