"""Windows of tokens out of text: a text file, a folder of them, a ``.jsonl`` with ``text``, or token ids (a ``.bin/.idx`` prefix).

A window lies within one document, so there is neither padding nor a separator in it; what remains of a document behind its last whole
window is left. The first windows of all documents come first, then the second ones, until there are enough.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megastab.analysis.subject import Subject
from megastab.config.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".text")
CHARACTERS_A_TOKEN = 8  # of text tokenised at first for each token wanted: more than most text has

Document = Callable[[int], list[int]]
"""How many tokens are wanted -> the first ones of the document, fewer where it is shorter."""


def text_windows(subject: Subject, source: str | Path, num_windows: int, seq_len: int, bos: bool = False) -> Tensor:
    """[N, S] int64 token ids on the CPU.

    Args:
        subject: whose tokenizer it is.
        source: see above.
        num_windows: N.
        seq_len: S; with ``bos`` the BOS token is one of them, so that the text is the same but for its last token.
        bos: start every window with the BOS token.
    """
    if num_windows < 1 or seq_len < 1:
        raise UserError(f"--windows {num_windows} and --seq-len {seq_len} must be at least 1")
    if seq_len > subject.max_seq_len:
        raise UserError(f"--seq-len {seq_len} is more than the {subject.max_seq_len} positions {subject.name} was built for")
    if bos and subject.bos is None:
        raise UserError(f"{subject.name} has no BOS token ({subject.no_codec or 'its tokenizer names none'}): leave --bos out")
    windows = _cut(list(_documents(subject, str(source))), num_windows, seq_len, str(source))
    if bos:
        windows = [[int(subject.bos or 0), *window[:-1]] for window in windows]
    out = torch.tensor(windows, dtype=torch.int64)
    if int(out.max()) >= subject.vocab_size or int(out.min()) < 0:
        raise UserError(f"{source} holds token id {int(out.max())}, but {subject.name} has {subject.vocab_size}: not its tokenizer's ids")
    return out


def _cut(documents: list[Document], num_windows: int, seq_len: int, source: str) -> list[list[int]]:
    windows: list[list[int]] = []
    longer, turn = list(enumerate(documents)), 0
    while longer and len(windows) < num_windows:
        still = []
        for place, document in longer:
            ids = document((turn + 1) * seq_len)[turn * seq_len :]
            if len(ids) == seq_len:
                windows.append(ids)
                still.append((place, document))
            if len(windows) == num_windows:
                return windows
        longer, turn = still, turn + 1
    longest = max((len(document(seq_len)) for document in documents), default=0)
    why = f"the longest has only {longest} tokens" if longest < seq_len else f"they make {len(windows)}"
    raise UserError(
        f"{source}: {num_windows} windows of {seq_len} tokens asked, but of its {len(documents)} documents {why}; "
        f"lower --seq-len or --windows, or give more text"
    )


def _documents(subject: Subject, source: str) -> Iterator[Document]:
    path = Path(source)
    if Path(f"{source}.idx").is_file():
        return _of_tokens(subject, source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
        if not files:
            raise UserError(f"{source}: no text files in this folder ({', '.join(TEXT_SUFFIXES)})")
        return (_of_text(subject, _read(file)) for file in files)
    if not path.is_file():
        raise UserError(f"{source}: no such file or folder, and no {source}.idx; give a text, a .jsonl, a folder, or a .bin/.idx prefix")
    if path.suffix == ".jsonl":
        return (_of_text(subject, text) for text in _lines(path))
    if path.suffix in (".bin", ".idx"):
        raise UserError(f"{source}: give the prefix, without {path.suffix}")
    return iter([_of_text(subject, _read(path))])


def _of_text(subject: Subject, text: str) -> Document:
    """Tokenised as far as asked, so that a long text costs what is used of it."""
    known: list[int] = []
    used = 0  # characters of the text that are in known

    def first(count: int) -> list[int]:
        nonlocal known, used
        while len(known) < count and used < len(text):
            used = max(2 * used, count * CHARACTERS_A_TOKEN)
            known = subject.encode(text[:used])
        return known[:count]

    return first


def _of_tokens(subject: Subject, prefix: str) -> Iterator[Document]:
    from megastab.data.indexed import open_indexed

    tokenizer = subject.tokenizer if subject.is_ours else None
    file = open_indexed(prefix, tokenizer, subject.vocab_size)

    def document(start: int, length: int) -> Document:
        return lambda count: [int(i) for i in file.tokens[start : start + min(count, length)]]

    return (document(int(start), int(length)) for start, length in zip(file.starts, file.lengths, strict=True))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from None


def _lines(path: Path) -> Iterator[str]:
    for number, line in enumerate(_read(path).splitlines(), 1):
        if line.strip():
            try:
                yield str(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f'{path}: line {number} is no JSON object with a "text"') from None
