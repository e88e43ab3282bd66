"""The same model in Hugging Face's ``Trainer``: a callback hands the turn back after every step.

bf16 there is autocast over fp32 weights, as its users run it. A step is timed from one ``on_step_end`` to the next (less the wait for
the turn), so that everything the Trainer does is in it.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from megastab.report.bench.cases import BATCH, LEARNING_RATE, SEQ, SIZES, Spec
from megastab.report.bench.turns import Turns


class RandomTokens(Dataset[dict[str, torch.Tensor]]):
    """Uniform tokens, made beforehand."""

    def __init__(self, vocab_size: int):
        self.tokens = torch.randint(0, vocab_size, (4 * BATCH, SEQ), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.tokens[index % len(self.tokens)]
        return {"input_ids": row, "labels": row}  # the model shifts the labels itself


class TakeTurns(TrainerCallback):
    """Steps when asked."""

    def __init__(self, turns: Turns):
        self.turns, self.began, self.cpu_began = turns, 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Everything is built."""
        self.turns.reply("ready")
        self._wait(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is done."""
        get_accelerator().synchronize()
        seconds, cpu_seconds = time.perf_counter() - self.began, time.process_time() - self.cpu_began
        self.turns.reply({"seconds": [seconds], "cpu_seconds": [cpu_seconds]})
        self._wait(control)

    def _wait(self, control: Any) -> None:
        control.should_training_stop = self.turns.next() is None
        self.began, self.cpu_began = time.perf_counter(), time.process_time()


def run(spec: Spec, turns: Turns) -> None:
    """Train until the parent has no more to ask."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=LlamaForCausalLM(_model_config(spec)),
            args=_arguments(spec, folder),
            train_dataset=RandomTokens(SIZES[spec.size]["vocab_size"]),
            callbacks=[TakeTurns(turns)],
        )
        trainer.train()


def _model_config(spec: Spec) -> LlamaConfig:
    size = SIZES[spec.size]
    return LlamaConfig(
        vocab_size=size["vocab_size"],
        hidden_size=size["hidden_size"],
        intermediate_size=size["ffn_hidden_size"],
        num_hidden_layers=size["num_layers"],
        num_attention_heads=size["num_heads"],
        max_position_embeddings=SEQ,
        tie_word_embeddings=False,
        use_cache=False,
    )


def _arguments(spec: Spec, folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=1_000_000,
        per_device_train_batch_size=BATCH,
        bf16=spec.precision == "bf16",
        use_cpu=get_accelerator().device_name() == "cpu",
        optim="adamw_torch_fused",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        torch_compile=spec.is_compiled,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
