"""Multiple-choice accuracy: the right choice is the one the model finds likeliest, by the sum of its tokens' log-probabilities or by
that sum divided by the choice's bytes, which takes away the advantage of short choices and does not depend on the tokenizer.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from megastab.analysis import arguments as shared
from megastab.analysis import probe_arguments as probes
from megastab.analysis.choice_file import Prepared, Question, prepare, read_questions
from megastab.analysis.output import Table, new_figure
from megastab.analysis.subject import Subject
from megastab.config.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Logits = Callable[[Tensor], Tensor]
"""[B, S] ids -> [B, S, V] logits of the tokens that follow."""


@dataclass(frozen=True)
class Accuracy:
    """Share of questions answered right, with the standard error of a binomial share."""

    right: int
    questions: int

    @property
    def share(self) -> float:
        """Right answers over questions."""
        return self.right / self.questions

    @property
    def standard_error(self) -> float:
        """sqrt(p (1 - p) / n)."""
        return math.sqrt(self.share * (1 - self.share) / self.questions)


@torch.no_grad()
def score(prepared: Sequence[Prepared], logits: Logits, budget_tokens: int, progress: Callable[[int], object]) -> list[list[float]]:
    """The sum of log-probabilities of every choice of every question, in nats.

    Args:
        prepared: the questions' tokens.
        logits: the model; causal, since shorter sequences of a batch are padded on the right.
        budget_tokens: of a batch, padding among them; a longer sequence is a batch of its own.
        progress: called with the number of choices done since the last call.
    """
    found = [[0.0] * len(each.ids) for each in prepared]
    for batch in _batches(prepared, budget_tokens):
        ids = [prepared[q].ids[c] for q, c in batch]
        starts = [prepared[q].first_scored for q, _ in batch]
        for (q, c), value in zip(batch, _sums(ids, starts, logits), strict=True):
            found[q][c] = value
        progress(len(batch))
    return found


def _batches(prepared: Sequence[Prepared], budget_tokens: int) -> Iterator[list[tuple[int, int]]]:
    """(question, choice) of sequences of about one length, the longest first: what does not fit the memory fails at once."""
    order = [(q, c) for q, each in enumerate(prepared) for c in range(len(each.ids))]
    order.sort(key=lambda at: -len(prepared[at[0]].ids[at[1]]))
    while order:
        longest = len(prepared[order[0][0]].ids[order[0][1]])
        size = max(1, budget_tokens // longest)
        yield order[:size]
        del order[:size]


def _sums(ids: Sequence[Sequence[int]], starts: Sequence[int], logits: Logits) -> list[float]:
    """Of one batch. Token t is predicted at t - 1, so the last is never an input; padding lies behind what is read."""
    inputs_BS = torch.zeros(len(ids), max(map(len, ids)) - 1, dtype=torch.long)
    for row, each in enumerate(ids):
        inputs_BS[row, : len(each) - 1] = torch.tensor(each[:-1])
    logits_BSV = logits(inputs_BS)
    sums = []
    for row, (each, start) in enumerate(zip(ids, starts, strict=True)):
        targets_K = torch.tensor(each[start:], device=logits_BSV.device)
        log_probabilities_KV = logits_BSV[row, start - 1 : len(each) - 1].float().log_softmax(-1)
        sums.append(float(log_probabilities_KV.gather(1, targets_K[:, None]).double().sum()))
    return sums


def answers(questions: Sequence[Question], scores: Sequence[Sequence[float]], per_byte: bool) -> list[int]:
    """The choice of the highest score of every question (the first of equal ones).

    Raises:
        UserError: a score is not a number.
    """
    found = []
    for question, sums in zip(questions, scores, strict=True):
        if not all(map(math.isfinite, sums)):
            raise UserError(f"line {question.line}: a choice's log-probability is {sums}; the model's logits overflow: use fp32")
        values = [total / size for total, size in zip(sums, question.choice_bytes, strict=True)] if per_byte else list(sums)
        found.append(values.index(max(values)))
    return found


def accuracy(questions: Sequence[Question], answered: Sequence[int]) -> Accuracy:
    """How many were answered by their label."""
    return Accuracy(sum(question.label == choice for question, choice in zip(questions, answered, strict=True)), len(questions))


@dataclass(frozen=True)
class Findings:
    """Of one model on one file."""

    scores: list[list[float]]
    by_sum: list[int]
    by_byte: list[int]
    truncated: int
    """Questions whose context was longer than the window."""

    def accuracies(self, questions: Sequence[Question]) -> dict[str, Accuracy]:
        """By either rule."""
        return {"sum": accuracy(questions, self.by_sum), "per byte": accuracy(questions, self.by_byte)}


def ask(subject: Subject, questions: Sequence[Question], bos: bool, budget_tokens: int = 4096, window: int | None = None) -> Findings:
    """Score every question; progress counts choices. ``window`` None is what the model was built for."""
    first = [subject.bos] if bos and subject.bos is not None else []
    limit = min(window or subject.max_seq_len, subject.max_seq_len)
    ready = [prepare(question, subject.encode, first, limit) for question in questions]
    with tqdm(total=sum(len(each.ids) for each in ready), desc="choice", unit="choice", leave=False, dynamic_ncols=True) as bar:
        scores = score(ready, subject.logits, budget_tokens, bar.update)
    chosen = {per_byte: answers(questions, scores, per_byte) for per_byte in (False, True)}
    return Findings(scores, chosen[False], chosen[True], sum(each.is_truncated for each in ready))


def chance(questions: Sequence[Question]) -> float:
    """The expected share of a guesser: the mean of 1 / choices."""
    return math.fsum(1 / len(question.choices) for question in questions) / len(questions)


def figure_of(title: str, found: dict[str, Accuracy], guessing: float) -> Figure:
    """Both accuracies with their standard errors, and what guessing gives."""
    figure = new_figure(4.5, 3.5)
    axes = figure.subplots()
    axes.bar(list(found), [a.share for a in found.values()], yerr=[a.standard_error for a in found.values()], color="#4C78A8", capsize=6)
    axes.axhline(guessing, color="#E45756", linestyle="--", label="guessing")
    axes.set_ylim(0, 1)
    axes.set_ylabel("accuracy")
    axes.set_title(title, fontsize=9)
    axes.legend()
    return figure


def _run(arguments: argparse.Namespace) -> None:
    if arguments.batch_tokens < 1 or (arguments.limit is not None and arguments.limit < 1):
        raise UserError(f"--batch-tokens {arguments.batch_tokens} and --limit {arguments.limit} must be at least 1")
    questions = read_questions(arguments.questions, arguments.limit)
    subject = shared.subject_of(arguments)
    bos = probes.starts_with_bos(arguments, subject)
    found = ask(subject, questions, bos, arguments.batch_tokens, arguments.seq_len)
    accuracies, guessing = found.accuracies(questions), chance(questions)
    rows = [[rule, a.share, a.standard_error, guessing, a.right, a.questions] for rule, a in accuracies.items()]
    title = f"{subject.name} on {Path(arguments.questions).name}"
    columns = ["likeliest by", "accuracy", "standard error", "guessing", "right", "questions"]
    tables = [Table(f"{title} ({found.truncated} contexts truncated)", columns, rows)]
    data = {
        "model": subject.name,
        "questions": arguments.questions,
        "bos": bos,
        "truncated": found.truncated,
        "guessing": guessing,
        "accuracy": {rule: {"share": a.share, "standard_error": a.standard_error, "right": a.right} for rule, a in accuracies.items()},
        "lines": [
            {"line": q.line, "label": q.label, "scores": scores, "bytes": q.choice_bytes}
            for q, scores in zip(questions, found.scores, strict=True)
        ],
    }
    output = shared.output_of(arguments)
    output.write("choice", data, tables)
    output.picture("choice", figure_of(title, accuracies, guessing))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model_arguments(parser)
    parser.add_argument(
        "--questions", required=True, metavar="FILE", help='.jsonl of {"context": str, "choices": [str, ...], "label": int}'
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N questions only")
    parser.add_argument(
        "--seq-len", type=int, metavar="S", help="window; older tokens of a longer context are cut (default: the model's own)"
    )
    parser.add_argument("--batch-tokens", type=int, default=4096, metavar="T", help="tokens of one forward pass (default: %(default)s)")
    probes.add_start_argument(parser)
    shared.add_output_argument(parser)


ANALYSIS = shared.Analysis("choice", "multiple-choice accuracy on a JSONL file", _add_arguments, _run)
