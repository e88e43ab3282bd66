"""Small runs as data: a layout, what it trains, and the samples it trains on, the same whatever the layout."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megastab.data.samples import Sample

SEQ, VOCAB, GLOBAL_BATCH, STEPS = 16, 100, 12, 8

# An std well above the usual one, so that at width 32 attention is far from uniform and no gradient is lost in rounding.
LLAMA: dict[str, Any] = {
    "arch": "llama", "num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 4, "ffn_hidden_size": 64,
    "max_seq_len": SEQ, "vocab_size": VOCAB, "init": {"std": 0.1},
}  # fmt: skip
GPT = {**LLAMA, "arch": "gpt"}
# Every value of the fields that say which norms there are and where, over LLAMA.
NORM_VARIANTS: dict[str, dict[str, Any]] = {
    "dyt": {"norm": "dyt"},
    "dyt without scale": {"norm": "dyt", "dyt": {"embedding_scale": False}},
    "gpt dyt": {**GPT, "norm": "dyt", "embedding_norm": True},
    "post": {"norm_position": "post", "norm": "layernorm"},
    "peri": {"norm_position": "peri", "embedding_norm": True},
    "reordered": {"norm_position": "reordered"},
    "gpt peri": {**GPT, "norm_position": "peri", "embedding_norm": True, "embedding_multiplier": 2.0},
    "scaled": {"layer_norm_scaling": True, "embedding_multiplier": 2.0},
    "dyt peri": {"norm": "dyt", "norm_position": "peri", "embedding_norm": True},
    "softcap": {"logit_softcap": 1.5, "tie_embeddings": True},
}

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}},
    # eps well above rounding: Adam divides by |g|, and near g = 0 the order of a sum would decide the sign of a whole step.
    "AdamW": {"type": "AdamW", "params": {"lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1}},
    "OrthoAdam": {"type": "OrthoAdam", "params": {"lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1}},
}


@dataclass(frozen=True)
class Layout:
    """How a run is cut. Data parallelism is what remains of ``world``."""

    world: int = 1
    tp: int = 1
    pp: int = 1
    sp: bool = False
    zero: int = 0
    accumulation: int = 1
    cp: int = 1
    recompute: str = "none"
    offload: bool = False
    offload_param: bool = False
    compile: bool = False
    activations: str = "none"
    """Where they are offloaded to; the file's folder is of the test process."""

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp * self.cp)

    def __str__(self) -> str:
        words = [f"tp{self.tp}" if self.tp > 1 else "", f"pp{self.pp}" if self.pp > 1 else "", "sp" if self.sp else ""]
        words += [f"cp{self.cp}" if self.cp > 1 else ""]
        words += [f"dp{self.dp}" if self.dp > 1 else "", f"zero{self.zero}" if self.zero else "", "offload" if self.offload else ""]
        words += ["params" if self.offload_param else ""]
        words += [f"accumulate{self.accumulation}" if self.accumulation > 1 else "", self.recompute if self.recompute != "none" else ""]
        words += [f"activations_{self.activations}" if self.activations != "none" else "", "compiled" if self.compile else ""]
        return "-".join(word for word in words if word) or "single"


SINGLE = Layout()


def config_of(layout: Layout, optimizer: str = "AdamW", dtype: str = "fp32", **changes: Any) -> dict[str, Any]:
    """A complete JSON: ``changes`` are dotted keys with ``__`` for the dot (``model__norm="layernorm"``)."""
    zero: dict[str, Any] = {"stage": layout.zero}
    if layout.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if layout.offload_param:
        zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // (layout.dp * layout.accumulation),
        "optimizer": copy.deepcopy(OPTIMIZERS[optimizer]),
        "zero_optimization": zero,
        "gradient_clipping": 0.0,
        "megastab": {
            "model": copy.deepcopy(LLAMA),
            "parallel": {
                "tensor": layout.tp,
                "pipeline": layout.pp,
                "sequence": layout.sp,
                "context": layout.cp,
                "recompute": layout.recompute,
            },
            "schedule": {"kind": "cosine", "warmup_steps": 2},
            "run": {"total_steps": STEPS, "resume": "none", "compile": layout.compile},
        },
    }
    if layout.activations != "none":
        folder = str(Path(tempfile.gettempdir()) / "megastab-activations") if layout.activations == "ssd" else None
        moved = {"kind": layout.activations, "folder": folder, "amount": "all", "min_kb": 0}
        config["megastab"]["parallel"]["activation_offload"] = moved
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        target = config if path[:1] == ["ds"] else config["megastab"]
        for key in path[1:] if path[:1] == ["ds"] else path:
            target = target.setdefault(key, {})
        target[last] = {**target[last], **value} if isinstance(target.get(last), dict) else value
    return config


class SyntheticSource:
    """Samples that can be learned: runs that count upwards, broken at random places; documents of very different lengths."""

    seq_len = SEQ
    first_epoch_samples = 1 << 30

    def __init__(self, vocab: int = VOCAB):
        self.vocab = vocab

    def __getitem__(self, index: int) -> Sample:
        draw = np.random.default_rng(index)
        tokens = (draw.integers(self.vocab) + np.cumsum(draw.choice([1, 1, 1, 7], SEQ + 1))) % self.vocab
        # Sample 0 has one document, sample 5 six short ones: targets per sample differ, also between the ranks of a step.
        documents = np.cumsum(np.concatenate([[0], draw.random(SEQ) < 0.07 * (index % 6)])).astype(np.int32)
        return Sample(tokens.astype(np.int64), documents[:-1], documents[:-1] == documents[1:])

    def trace(self, index: int) -> tuple[str, list[int]]:
        return "synthetic", [index]
