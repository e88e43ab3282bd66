"""What ``tools/convert.py`` does: models in and out of Hugging Face's form, checkpoints into other files. Each returns what to say."""

from __future__ import annotations

from pathlib import Path

from megastab.checkpoint.hf_export import bytes_of, export_model
from megastab.checkpoint.hf_import import FILL_IN, import_model
from megastab.checkpoint.reshard import rewrite
from megastab.engine.inference import checkpoint_of


def bring(folder: str, out: str, max_seq_len: int | None = None) -> str:
    """From Hugging Face."""
    made = import_model(folder, out, max_seq_len)
    said = f"{made.folder}: weights, tokenizer and config.json; give it your data where it says {FILL_IN}"
    return "\n  note: ".join([said, *made.notes])


def send(folder: str, out: str, max_shard_size: str, tokenizer: Path | None = None, has_code: bool = False) -> str:
    """To Hugging Face."""
    checkpoint, size = checkpoint_of(folder), bytes_of(max_shard_size)
    made = export_model(checkpoint, out, size, tokenizer, has_code)
    return "\n  note: ".join([f"{made.folder}: {made.kind}, from {checkpoint}; {made.said}", *made.notes])


def reshard(folder: str, out: str, num_files: int = 1) -> str:
    """Into other files."""
    made = rewrite(checkpoint_of(folder), Path(out), num_files)
    return f"{made}: go on from it at any layout with megastab.run.resume={made.parent}"
