"""From a Hugging Face directory to a folder a run can start from: our weights, a config to fill in, the tokenizer's files.

``OUT`` holds ``weights/`` (canonical names, safetensors), ``config.json`` (a whole run's, its model section and ``run.init_from`` set) and
``tokenizer/``. It appears under its name when it is whole.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megastab.checkpoint.hf_files import HuggingFaceFiles
from megastab.checkpoint.hf_tokenizer import FOLDER as TOKENIZER
from megastab.checkpoint.hf_tokenizer import SENTENCEPIECE, copy_tokenizer
from megastab.checkpoint.init_from import Start, open_hugging_face
from megastab.checkpoint.tensor_file import Planned, write_tensors
from megastab.checkpoint.weight_source import WeightSource, stored_dtype
from megastab.checkpoint.weights import FOLDER
from megastab.config.errors import UserError
from megastab.data.tokenizer import Tokenizer

PARTIAL = ".partial"
FILL_IN = "FILL_IN"
HUGGING_FACE = "tokenizer.json"


@dataclass(frozen=True)
class Imported:
    """What there is now, in words as well."""

    folder: Path
    notes: tuple[str, ...]


def fresh_partial(out: Path) -> Path:
    """An empty ``OUT.partial`` to write into; an ``OUT`` that is there is refused."""
    if out.exists():
        raise UserError(f"{out} is there already: give another name, or remove it")
    partial = out.with_name(out.name + PARTIAL)
    if partial.exists():
        shutil.rmtree(partial)  # of an attempt that did not end
    partial.mkdir(parents=True)
    return partial


def import_model(folder: str | Path, out: str | Path, max_seq_len: int | None = None) -> Imported:
    """Import the model of a local directory; memory is bounded by one tensor.

    Args:
        folder: holds ``config.json`` and safetensors, whole or in shards.
        out: what to make; it must not exist.
        max_seq_len: a shorter context than the model's (rotary models only).

    Raises:
        UserError: what is there cannot be expressed or read, or ``out`` exists.
    """
    files, out = HuggingFaceFiles(folder), Path(out)
    start = open_hugging_face(files, max_seq_len)
    partial = fresh_partial(out)
    (partial / FOLDER).mkdir()
    write_weights(start.source, partial / FOLDER / "imported.safetensors")
    notes = copy_tokenizer(files.folder, files.config, partial / TOKENIZER)
    tokenizer, said = _usable_tokenizer(partial / TOKENIZER, start)
    config = config_for(start, out, str(out / TOKENIZER / tokenizer) if tokenizer else None)
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    partial.rename(out)
    return Imported(out, (*notes, *said, *_padding_note(start)))


def write_weights(source: WeightSource, path: Path) -> None:
    """All of a source as one weights file of ours, a matrix at a time."""
    names = source.names()
    whole = (source.rows(name, 0, source.shape(name)[0]) for name in names)
    starts = json.dumps(dict.fromkeys(names, 0))
    write_tensors(path, [Planned(name, source.dtype(name), source.shape(name)) for name in names], whole, {"starts": starts})


def _usable_tokenizer(folder: Path, start: Start) -> tuple[str | None, list[str]]:
    """Which of the tokenizer's files our data tools can use, and what to say where it is none."""
    said = []
    for name in (SENTENCEPIECE, HUGGING_FACE):
        if not (folder / name).is_file():
            continue
        try:
            size = Tokenizer(folder / name).vocab_size
        except UserError as error:  # Llama 3 gives another kind of file SentencePiece's name
            said.append(f"{error}: megastab.data.tokenizer is null")
            continue
        if size == start.model.vocab_size:
            return name, []
        said.append(f"{name} has {size} pieces, the model {start.model.vocab_size} tokens: megastab.data.tokenizer is null")
    return None, said or [
        f"no {SENTENCEPIECE} and no {HUGGING_FACE}: prepare the data with the model's own tokenizer (Megatron's .bin/.idx files train, "
        f"whatever made them); megastab.data.tokenizer is null"
    ]


def _padding_note(start: Start) -> list[str]:
    padded, vocab = start.source.shape("embedding")[0], start.model.vocab_size or 0
    return [f"the vocabulary of {vocab} is padded to {padded} rows with zeros; export cuts them off"] if padded != vocab else []


def config_for(start: Start, out: Path, tokenizer: str | None) -> dict[str, Any]:
    """A run that continues from ``out``: what a person fills in is the data, and what they may want to change is the rest."""
    model = start.model.model_dump(mode="json", exclude_defaults=True)
    is_half = stored_dtype(start.source) != torch.float32
    config: dict[str, Any] = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 1}
    config |= {"bf16": {"enabled": True}} if is_half else {}
    return config | {
        "zero_optimization": {"stage": 1},
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
        "megastab": {
            "model": model,
            "parallel": {"tensor": 1, "pipeline": 1, "sequence": False, "recompute": "none"},
            "data": {"train": [[1.0, f"{FILL_IN}_train"]], "valid": [], "tokenizer": tokenizer},
            "schedule": {"kind": "cosine", "warmup_steps": 100, "min_lr_ratio": 0.1},
            "run": {"dir": f"runs/{out.name}", "init_from": str(out), "total_steps": 1000, "save_interval": 500},
        },
    }
