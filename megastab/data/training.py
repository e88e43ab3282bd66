"""From the config to what a run reads: the tokenizer, the blends, and each data-parallel rank's batches of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megastab.config.config import Config
from megastab.config.errors import UserError
from megastab.data.batches import Batches, Evaluation, evaluation_batches
from megastab.data.blend import Blend, open_blend
from megastab.data.sidecar import read_sidecar
from megastab.data.tokenizer import Tokenizer
from megastab.parallel.grid import Axis


@dataclass(frozen=True)
class TextFacts:
    """What turns a loss per token into bits per byte, and what there is to beat."""

    bytes_per_token: float
    unigram_bits_per_byte: float
    """What a model that knows only token frequencies would reach."""


@dataclass(frozen=True)
class TrainingData:
    """What one data-parallel rank reads."""

    train: Batches
    """Endless training steps."""
    valid: Evaluation | None = None
    """The same validation samples each time."""
    valid_text: TextFacts | None = None
    """Of the validation sets, where they tell."""
    tokenizer: str | None = None
    """The tokenizer's fingerprint."""


@dataclass(frozen=True)
class Sources:
    """The opened files, the same on every rank."""

    train: Blend
    valid: Blend | None
    valid_text: TextFacts | None
    tokenizer: str | None

    def cut(self, config: Config, samples: Axis, context: Axis) -> TrainingData:
        """The share of the rank that has its place in ``samples`` among a step's samples and in ``context`` among their positions."""
        share: dict[str, Any] = {"micro_batch": config.micro_batch, "document_mask": config.megastab.data.document_mask}
        share |= {"dp_rank": samples.rank, "dp_size": samples.size, "cp_rank": context.rank, "cp_size": context.size}
        batches = Batches(self.train, accumulation=config.accumulation, **share)
        valid = None
        if self.valid is not None:
            valid = evaluation_batches(self.valid, config.megastab.run.eval_samples, **share)
        return TrainingData(batches, valid, self.valid_text, self.tokenizer)


def open_training_data(config: Config) -> tuple[Config, Sources]:
    """Open what ``megastab.data`` names; returns the config with its vocabulary filled in from the tokenizer.

    Raises:
        UserError: missing, damaged or disagreeing files, or no vocabulary size to be had.
    """
    block = config.megastab
    tokenizer = Tokenizer(block.data.tokenizer) if block.data.tokenizer else None
    if tokenizer is not None:
        config = config.with_vocab(tokenizer.vocab_size)
    elif block.model.vocab_size is None:
        raise UserError("megastab.model.vocab_size and megastab.data.tokenizer are both null: give one of them")
    vocab_size, seq = config.megastab.model.vocab_size, block.model.max_seq_len
    train = open_blend(block.data.train, seq, block.run.seed, tokenizer=tokenizer, vocab_size=vocab_size)
    valid = None
    if block.data.valid:
        valid = open_blend(block.data.valid, seq, block.run.seed, tokenizer=tokenizer, vocab_size=vocab_size, shuffle=False)
    return config, Sources(train, valid, _text_facts(block.data.valid), tokenizer.fingerprint if tokenizer else None)


def _text_facts(entries: list[tuple[float, str]]) -> TextFacts | None:
    """Means over the validation sets by weight; None if some set has no sidecar."""
    sidecars = [(weight, read_sidecar(prefix)) for weight, prefix in entries]
    known = [(weight, sidecar) for weight, sidecar in sidecars if sidecar is not None and sidecar.tokens]
    if not known or len(known) < len(sidecars):
        return None
    total = sum(weight for weight, _ in known)
    bytes_per_token = sum(weight * sidecar.text_bytes / sidecar.tokens for weight, sidecar in known) / total
    return TextFacts(bytes_per_token, sum(weight * sidecar.unigram_bits_per_byte for weight, sidecar in known) / total)
