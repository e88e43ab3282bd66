"""What is measured: the two models of the promises, and the specification of a contestant. Imports nothing slow: the parent reads it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

Contestant = Literal["ours", "bare", "both", "hugging_face", "stability", "offload"]
Precision = Literal["bf16", "fp32"]
Optimizer = Literal["AdamW", "OrthoAdam"]

BATCH, SEQ = 8, 256
TOKENS = BATCH * SEQ
LEARNING_RATE = 1e-3

SIZES: dict[str, dict[str, int]] = {
    "A": {"num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 768, "num_heads": 4, "vocab_size": 4096},
    "B": {"num_layers": 8, "hidden_size": 512, "ffn_hidden_size": 1408, "num_heads": 8, "vocab_size": 8192},
    # Of `offload` and `recompute` only: most of its memory is activations.
    "deep": {"num_layers": 16, "hidden_size": 256, "ffn_hidden_size": 768, "num_heads": 4, "vocab_size": 4096},
}


@dataclass(frozen=True)
class Spec:
    """One contestant: who, which model, and how it is run."""

    who: Contestant
    """``both`` holds ours and bare in one process, started from the same weights; a step is one of each.
    ``stability`` takes the parts of that figure in turn."""
    size: str = "A"
    precision: Precision = "bf16"
    is_compiled: bool = False
    zero_stage: int = 1
    tensor: int = 1
    data: str | None = None
    """Prefix of a dataset to fetch from each step; None: random tokens made beforehand."""
    batch: int = BATCH
    """Sequences a step of ``ours`` and ``bare``."""
    optimizer: Optimizer = "AdamW"
    activations: dict[str, Any] | None = None
    """The section ``activation_offload`` of ``offload``."""
    recompute: str = "none"

    def dump(self) -> str:
        """As a command-line argument."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Back from the command line."""
        return cls(**json.loads(text))

    def source(self) -> dict[str, Any]:
        """The one JSON of this run, as ``load_config`` takes it. The rate is constant because the bare loop's is."""
        parameters = {"lr": LEARNING_RATE, "betas": [0.9, 0.95], "weight_decay": 0.1}
        return {
            "train_batch_size": self.batch,
            "gradient_clipping": 1.0,
            "optimizer": {"type": self.optimizer, "params": parameters},
            "zero_optimization": {"stage": 0 if self.precision == "fp32" else self.zero_stage},
            "bf16": {"enabled": self.precision == "bf16"},
            "megastab": {
                "model": {"arch": "llama", "max_seq_len": SEQ, **SIZES[self.size]},
                "parallel": {
                    "tensor": self.tensor,
                    "recompute": self.recompute,
                    **({"activation_offload": self.activations} if self.activations else {}),
                },
                "schedule": {"kind": "constant"},
                "data": {"train": [[1.0, self.data]] if self.data else []},
                "run": {"total_steps": 1_000_000, "compile": self.is_compiled},
            },
        }

    @property
    def name(self) -> str:
        """For a table: ``A bf16 eager``."""
        return f"{self.size} {self.precision} {'compiled' if self.is_compiled else 'eager'}"


@dataclass(frozen=True)
class Options:
    """How thoroughly to measure."""

    threads: int = 2
    is_quick: bool = False
    """A smoke test of the bench itself: model A only, few rounds; its figures decide nothing."""

    @property
    def sizes(self) -> tuple[str, ...]:
        """Models to measure."""
        return ("A",) if self.is_quick else ("A", "B")

    @property
    def rounds(self) -> int:
        """Timed steps of each contestant."""
        return 5 if self.is_quick else 31

    @property
    def repeats(self) -> int:
        """Repeats of what takes seconds: a start, a pass over a corpus."""
        return 1 if self.is_quick else 5
