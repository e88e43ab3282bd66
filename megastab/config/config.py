"""The checked config of a run: both owners' parts, the layout, and the facts derived from them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

from megastab.config.complete import Completion
from megastab.config.errors import UserError
from megastab.config.layout import Layout
from megastab.config.optimizers import canonical_type
from megastab.config.rules import Facts, total_steps, vocabulary_over_tensor, warmup_steps
from megastab.config.schema import Megastab
from megastab.config.settings import precision_of, stage_of


@dataclass(frozen=True)
class Config:
    """What ``load_config`` returns. Two configs are equal when they train the same way; who wrote a key does not matter."""

    megastab: Megastab
    """Our block."""
    deepspeed: dict[str, Any]
    """What ``deepspeed.initialize`` is handed: completed, without our block."""
    completions: tuple[Completion, ...] = field(compare=False)
    """The keys the loader wrote, with the reason of each."""
    layout: Layout
    """The division of the ranks."""

    @property
    def for_engine(self) -> dict[str, Any]:
        """``deepspeed`` as its engine can take it. DeepSpeed counts the ranks of a sequence among the data-parallel ones, since they
        work on the same weights, and checks its global batch by them: here it is ``context`` times as large."""
        if self.layout.context == 1:
            return self.deepspeed
        return {**self.deepspeed, "train_batch_size": self.global_batch * self.layout.context}

    @property
    def precision(self) -> str:
        """``fp32``, ``bf16`` or ``fp16``."""
        return precision_of(self.deepspeed)

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage, 0 to 3."""
        return stage_of(self.deepspeed)

    @property
    def micro_batch(self) -> int:
        """Samples of one forward on one data-parallel rank."""
        return int(self.deepspeed["train_micro_batch_size_per_gpu"])

    @property
    def accumulation(self) -> int:
        """Micro-batches of one step on one data-parallel rank."""
        return int(self.deepspeed["gradient_accumulation_steps"])

    @property
    def global_batch(self) -> int:
        """Samples of one step over all ranks."""
        return int(self.deepspeed["train_batch_size"])

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step over all ranks."""
        return self._facts.tokens_per_step

    @property
    def total_steps(self) -> int:
        """Steps to attempt, from ``run.total_steps`` or ``run.total_tokens``."""
        steps = total_steps(self._facts)
        assert steps is not None  # a rule refused the config otherwise
        return steps

    @property
    def warmup_steps(self) -> int:
        """Warm-up in steps, from ``schedule.warmup_steps`` or ``schedule.warmup_tokens``."""
        return warmup_steps(self._facts)

    @property
    def learning_rate(self) -> float:
        """The peak learning rate."""
        return float(self.deepspeed["optimizer"]["params"]["lr"])

    @property
    def optimizer_type(self) -> str:
        """The optimizer's class name as torch.optim spells it."""
        kind = canonical_type(self.deepspeed["optimizer"]["type"])
        assert kind is not None  # a rule refused the config otherwise
        return kind

    @property
    def optimizer_params(self) -> dict[str, Any]:
        """The optimizer's arguments as written, ``lr`` included, ready for the class."""
        params = {key: value for key, value in self.deepspeed["optimizer"]["params"].items() if value is not None}
        return {key: tuple(value) if isinstance(value, list) else value for key, value in params.items()}

    def resolved(self) -> dict[str, Any]:
        """The one JSON again, everything explicit; loading it on the same number of ranks gives an equal config."""
        return {**copy.deepcopy(self.deepspeed), "megastab": self.megastab.model_dump(mode="json")}

    def with_vocab(self, vocab_size: int) -> Config:
        """The config once the tokenizer has told its vocabulary; an error if the file said another size."""
        model = self.megastab.model
        if model.vocab_size not in (None, vocab_size):
            raise UserError(
                f"megastab.model.vocab_size = {model.vocab_size}, but the tokenizer {self.megastab.data.tokenizer} has {vocab_size} "
                f"entries: set vocab_size to {vocab_size} or null, or megastab.data.tokenizer to the right file."
            )
        named = self.megastab.model_copy(update={"model": model.model_copy(update={"vocab_size": vocab_size})})
        config = replace(self, megastab=named)
        if problem := vocabulary_over_tensor(config._facts):
            raise UserError(problem)
        return config

    @property
    def _facts(self) -> Facts:
        return Facts(self.megastab, self.deepspeed, self.layout)
