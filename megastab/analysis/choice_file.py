"""Multiple-choice questions from a JSONL file, and their tokens: where the context ends and what fits the model's window.

A line is ``{"context": str, "choices": [str, ...], "label": int}``. Context and choice are joined as they stand: a choice that is a new
word starts with its space. They are tokenised together, since that is how the model has met them in text, and what is scored starts at
the first token in which the context alone or any two choices differ: all choices of a question are conditioned on the very same
tokens, also where a choice's first letters merge with the context's last.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megastab.config.errors import UserError

NAMED = 5  # bad lines listed one by one


@dataclass(frozen=True)
class Question:
    """One line of the file."""

    line: int
    """Counted from 1."""
    context: str
    choices: tuple[str, ...]
    label: int
    """Of the right choice, counted from 0."""

    @property
    def choice_bytes(self) -> tuple[int, ...]:
        """UTF-8 bytes of every choice, white space around it not counted; at least 1."""
        return tuple(max(1, len(choice.strip().encode())) for choice in self.choices)


@dataclass(frozen=True)
class Prepared:
    """The tokens of one question's choices, cut to the window."""

    ids: tuple[tuple[int, ...], ...]
    """Of every choice, with the context before it."""
    first_scored: int
    """Position of the first token that is scored, the same for all choices; at least 1."""
    is_truncated: bool


def read_questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """The first ``limit`` questions of a file (all of them: None); blank lines are passed over.

    Raises:
        UserError: no such file, nothing in it, or bad lines, named by number with what is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}; give a UTF-8 file of one question a line") from None
    found: list[Question] = []
    bad: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if limit is not None and len(found) >= limit:
            break
        if line.strip():
            read = _question(number, line)
            found.append(read) if isinstance(read, Question) else bad.append(f"line {number}: {read}")
    if bad:
        more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise UserError(f'{path}: {"; ".join(bad[:NAMED])}{more}. A line is {{"context": str, "choices": [str, ...], "label": int}}')
    if not found:
        raise UserError(f"{path} holds no question")
    return found


def _question(number: int, line: str) -> Question | str:
    """The question of a line, or what is wrong with it."""
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        return f"not JSON ({error})"
    if not isinstance(value, dict):
        return f"a {type(value).__name__}, not an object"
    if missing := [key for key in ("context", "choices", "label") if key not in value]:
        return f"no {', '.join(missing)} (it has {', '.join(value) or 'nothing'})"
    context, choices, label = value["context"], value["choices"], value["label"]
    if not isinstance(context, str):
        return f"context is a {type(context).__name__}, not a text"
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        return f"choices is {json.dumps(choices)[:60]}, not a list of two or more texts"
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
        return f"label is {json.dumps(label)}, not an integer from 0 to {len(choices) - 1}"
    return Question(number, context, tuple(choices), label)


def prepare(question: Question, encode: Callable[[str], Sequence[int]], first_ids: Sequence[int], window: int) -> Prepared:
    """Tokens of a question's choices.

    Args:
        question: to be tokenised.
        encode: ids of a text, without special tokens.
        first_ids: ids every sequence starts with (beginning of text, or none); kept when the context is truncated.
        window: tokens the model takes; of a longer context the oldest tokens are cut, as many for every choice.

    Raises:
        UserError: the choices alone are longer than the window, one adds no token to its context, or nothing comes before them.
    """
    whole = [[*first_ids, *encode(question.context + choice)] for choice in question.choices]
    scored = _common_prefix([[*first_ids, *encode(question.context)], *whole])
    if any(len(ids) <= scored for ids in whole):
        raise UserError(f"line {question.line}: a choice adds no token to its context")
    if not scored:
        raise UserError(f"line {question.line}: no token comes before its choices, so that their first has no probability; use --bos with")
    cut = max(0, max(map(len, whole)) - 1 - window)  # the last token is predicted, never read
    if scored - cut < max(1, len(first_ids)):
        raise UserError(f"line {question.line}: its choices alone are longer than the model's window of {window} tokens")
    kept = [(*ids[: len(first_ids)], *ids[len(first_ids) + cut :]) for ids in whole]
    return Prepared(tuple(kept), scored - cut, cut > 0)


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Number of tokens all start with."""
    for position, tokens in enumerate(zip(*sequences, strict=False)):
        if len(set(tokens)) > 1:
            return position
    return min(map(len, sequences))
