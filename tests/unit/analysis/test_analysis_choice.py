"""Multiple choice: what is scored, against one sequence at a time by hand; where the context ends; and lines that are no questions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megastab.analysis.choice import accuracy, answers, ask, chance, score
from megastab.analysis.choice_file import Prepared, Question, prepare, read_questions
from megastab.analysis.command_line import parser_of
from megastab.analysis.subject import open_subject
from megastab.config.errors import UserError
from tests.unit.analysis.models import foreign_model, save_foreign, save_own

VOCAB, BOS = 60, 1
PIECES = ["he", "hel", "l", "lo", " w", "or", "ld", " ", "h", "e", "o", "w", "r", "d", "a", " a", "b"]


def encode(text: str) -> list[int]:
    """The longest piece first, as tokenizers with merges do: what follows may change how a text's end is cut."""
    ids = []
    while text:
        piece = max((p for p in PIECES if text.startswith(p)), key=len)
        ids.append(2 + PIECES.index(piece))
        text = text[len(piece) :]
    return ids


def words(ids: tuple[int, ...]) -> list[str]:
    return ["<s>" if i == BOS else PIECES[i - 2] for i in ids]


def logits(ids_BS: Tensor) -> Tensor:
    """A causal model made of sines: every token's logits depend on all before it and on its position."""
    seen_BS = torch.cumsum(torch.sin(ids_BS.double() * 1.7 + 1), 1) + 0.1 * torch.arange(ids_BS.shape[1])
    return torch.sin(seen_BS[..., None] * torch.arange(1, VOCAB + 1)) * 3


def question(context: str, *choices: str, label: int = 0) -> Question:
    return Question(1, context, choices, label)


def prepared(*questions: Question, window: int = 100) -> list[Prepared]:
    return [prepare(each, encode, [BOS], window) for each in questions]


def by_hand(ids: tuple[int, ...], first: int) -> float:
    total = 0.0
    for position in range(first, len(ids)):
        row = logits(torch.tensor([ids[:position]]))[0, -1]
        total += float(row[ids[position]]) - math.log(sum(math.exp(value) for value in row.tolist()))
    return total


def test_sums_are_those_of_one_sequence_at_a_time_whatever_the_padding() -> None:
    asked = [question("he", " w", " world", " a"), question("hello world", "a", "hello"), question("", "he", "hello")]
    ready = prepared(*asked)
    expected = [[by_hand(ids, each.first_scored) for ids in each.ids] for each in ready]
    done: list[int] = []
    for budget in (1, 13, 10**6):  # alone, a few together, all together
        found = score(ready, logits, budget, done.append)
        for mine, wanted in zip(found, expected, strict=True):
            assert mine == pytest.approx(wanted, rel=1e-6)  # the scores are made in fp32
    assert sum(done) == 3 * 7 and max(done) == 7


def test_what_is_scored_starts_where_context_or_choices_first_differ() -> None:
    (apart,) = prepared(question("hel", " w", " a"))
    assert [words(ids) for ids in apart.ids] == [["<s>", "hel", " w"], ["<s>", "hel", " a"]] and apart.first_scored == 2
    (merged,) = prepared(question("he", "l", "a"))  # "hel" is one piece: "he" is no prefix of it
    assert [words(ids) for ids in merged.ids] == [["<s>", "hel"], ["<s>", "he", "a"]] and merged.first_scored == 1
    (space,) = prepared(question("a ", "world", "a"))  # the space of the context goes into the choice's first piece
    assert words(space.ids[0]) == ["<s>", "a", " w", "or", "ld"] and space.first_scored == 2
    (prefix,) = prepared(question("a", " w", " world"))
    assert prefix.first_scored == 2 and len(prefix.ids[0]) == 3
    (empty,) = prepared(question("", "he", "a"))
    assert empty.first_scored == 1


def test_a_long_context_loses_its_oldest_tokens_the_same_for_every_choice() -> None:
    asked = question("ababab", " world", " a")
    (whole,) = prepared(asked, window=9)
    assert not whole.is_truncated and len(whole.ids[0]) == 10, "the last token is never an input"
    (cut,) = prepared(asked, window=6)
    assert cut.is_truncated and [words(ids) for ids in cut.ids] == [
        ["<s>", "b", "a", "b", " w", "or", "ld"],
        ["<s>", "b", "a", "b", " a"],
    ]
    assert cut.first_scored == 4
    (bare,) = prepared(asked, window=3)
    assert words(bare.ids[0]) == ["<s>", " w", "or", "ld"] and bare.first_scored == 1
    with pytest.raises(UserError, match="line 1: its choices alone are longer than the model's window of 2 tokens"):
        prepared(asked, window=2)


def test_a_choice_without_a_token_is_refused() -> None:
    with pytest.raises(UserError, match="line 1: a choice adds no token"):
        prepare(question("a", " ", "b"), lambda text: encode(text.strip()), [BOS], 10)


def test_accuracy_by_sum_and_by_byte() -> None:
    asked = [question("", "a", " hello ", label=1), question("", "a", "bb", "w", label=2), question("", "\u00e4", "aaa", label=0)]
    scores = [[-2.0, -9.0], [-4.0, -5.0, -3.9], [-4.0, -5.5]]
    assert answers(asked, scores, per_byte=False) == [0, 2, 0]
    assert answers(asked, scores, per_byte=True) == [1, 1, 1], "-9/5 > -2/1; -5/2 > -3.9/1; -5.5/3 > -4/2 (two bytes)"
    by_sum, by_byte = accuracy(asked, [0, 2, 0]), accuracy(asked, [1, 1, 1])
    assert (by_sum.right, by_sum.share) == (2, 2 / 3) and by_sum.standard_error == pytest.approx(math.sqrt(2 / 9 / 3))
    assert by_byte.right == 1 and chance(asked) == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)


def test_a_score_that_is_no_number_is_an_error() -> None:
    with pytest.raises(UserError, match="line 1.*use fp32"):
        answers([question("", "a", "b")], [[float("nan"), -1.0]], per_byte=False)


def write(folder: Path, *lines: object) -> Path:
    path = folder / "asked.jsonl"
    told = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(told), encoding="utf-8")
    return path


def test_questions_are_read_in_order_with_their_line_numbers(tmp_path: Path) -> None:
    """U+2028 ends a line for ``str.splitlines``, and none of JSONL."""
    good = {"context": "c\u2028", "choices": ["a", "b"], "label": 1, "more": "is passed over"}
    path = write(tmp_path, good, "", {**good, "label": 0}, good)
    assert [(each.line, each.label) for each in read_questions(path)] == [(1, 1), (3, 0), (4, 1)]
    assert read_questions(path)[0] == Question(1, "c\u2028", ("a", "b"), 1) and len(read_questions(path, limit=2)) == 2


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("[1]", "a list, not an object"),
        ({"context": "a", "options": []}, r"no choices, label \(it has context, options\)"),
        ({"context": 1, "choices": ["a", "b"], "label": 0}, "context is a int"),
        ({"context": "", "choices": ["a"], "label": 0}, r'choices is \["a"\], not a list of two'),
        ({"context": "", "choices": ["a", " "], "label": 0}, "choices is"),
        ({"context": "", "choices": ["a", 1], "label": 0}, "choices is"),
        ({"context": "", "choices": ["a", "b"], "label": 2}, "label is 2, not an integer from 0 to 1"),
        ({"context": "", "choices": ["a", "b"], "label": "0"}, 'label is "0"'),
        ({"context": "", "choices": ["a", "b"], "label": True}, "label is true"),
        ({"context": "", "choices": ["a", "b"], "label": -1}, "label is -1"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: object, problem: str) -> None:
    good = {"context": "", "choices": ["a", "b"], "label": 0}
    with pytest.raises(UserError, match=f"line 3: {problem}"):
        read_questions(write(tmp_path, good, good, line, good))


def test_many_bad_lines_are_counted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 1: .*line 5: .*; and 2 more\. A line is"):
        read_questions(write(tmp_path, *["no"] * 7))


def test_a_file_that_is_none_and_one_without_questions(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="holds no question"):
        read_questions(write(tmp_path, "", ""))


ASKED = [
    question("The fox", " jumps over the dog", " sleeps", label=0),
    question("2 + 2 =", " 4", " 22", " five of them", label=1),
    question("A context that is much longer than others, to be padded and cut", " or", " and", label=1),
]


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "ours"])
def test_padding_changes_no_model(family: str, tmp_path: Path, text_data: Path) -> None:
    """Sequences alone and in batches of other lengths, on models with learned and rotary positions and with sliding windows."""
    if family == "ours":
        from megastab.data.tokenizer import Tokenizer

        path = save_own(tmp_path, Tokenizer(text_data / "tok.model"), vocab_size=512)
    else:
        path = save_foreign(tmp_path, family, foreign_model(family, **({"sliding_window": 4} if family == "gemma2" else {})))
    subject = open_subject(path)
    alone, together = (ask(subject, ASKED, bos=True, budget_tokens=budget) for budget in (1, 10**6))
    for one, other in zip(alone.scores, together.scores, strict=True):
        assert one == pytest.approx(other, rel=1e-4)  # fp32 products of other shapes
    assert alone.truncated == 1
    shorter = ask(subject, ASKED, bos=True, window=20)
    assert shorter.truncated == (1 if family == "ours" else 2) and shorter.scores != alone.scores


def test_a_foreign_model_is_scored_token_by_token(tmp_path: Path) -> None:
    subject = open_subject(save_foreign(tmp_path))
    first = ASKED[0]
    found = ask(subject, [first], bos=True)
    for choice, value in zip(first.choices, found.scores[0], strict=True):
        ids = [1, *(ord(c) - 29 for c in first.context + choice)]
        rows = subject.logits(torch.tensor([ids]))[0].log_softmax(-1)
        expected = sum(float(rows[position - 1, ids[position]]) for position in range(1 + len(first.context), len(ids)))
        assert value == pytest.approx(expected, rel=1e-5)


def test_without_bos_something_must_come_before_the_choices(tmp_path: Path) -> None:
    subject = open_subject(save_foreign(tmp_path))
    assert ask(subject, [question("", "a", "b")], bos=True).by_sum in ([0], [1])
    with pytest.raises(UserError, match="line 1: no token comes before its choices.*--bos with"):
        ask(subject, [question("", "a", "b")], bos=False)
    with_bos, without = (ask(subject, ASKED[:1], bos).scores for bos in (True, False))
    assert with_bos != without


def run(*arguments: object) -> None:
    asked = parser_of(None).parse_args([str(each) for each in arguments])
    asked.run(asked)


def test_the_command_writes_tables_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_foreign(tmp_path / "model", "gpt2")
    lines = [{"context": q.context, "choices": q.choices, "label": q.label} for q in ASKED]
    path = write(tmp_path, *lines)
    run("choice", model, "--questions", path, "--output", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "choice.json").read_text())
    assert found["bos"] is True and found["truncated"] == 1 and found["guessing"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)
    for rule, divided in (("sum", False), ("per byte", True)):
        right = 0
        for line in found["lines"]:
            values = [s / b if divided else s for s, b in zip(line["scores"], line["bytes"], strict=True)]
            right += values.index(max(values)) == line["label"]
        assert found["accuracy"][rule]["right"] == right and found["accuracy"][rule]["share"] == right / 3
    assert [line["bytes"] for line in found["lines"]] == [[18, 6], [1, 2, 12], [2, 3]]
    assert (tmp_path / "out" / "choice.png").stat().st_size > 3000 and "per byte" in capsys.readouterr().out
    run("choice", model, "--questions", path, "--limit", 1, "--bos", "without", "--output", tmp_path / "other")
    other = json.loads((tmp_path / "other" / "choice.json").read_text())
    assert "(0 contexts truncated)" in capsys.readouterr().out
    assert other["bos"] is False and other["lines"][0]["scores"] != found["lines"][0]["scores"]
    with pytest.raises(UserError, match="--limit 0"):
        run("choice", model, "--questions", path, "--limit", 0)
