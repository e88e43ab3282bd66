"""From a checkpoint of any layout to a Hugging Face directory: safetensors in shards, config, tokenizer, and a check of the logits.

A tensor at a time: memory is bounded by one of theirs (GPT-2's fused q, k and v are one), until the check, which holds one model.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megastab.checkpoint import hf_check
from megastab.checkpoint.hf_config import kind_of, write_model
from megastab.checkpoint.hf_files import CONFIG, INDEX, WHOLE, read_json
from megastab.checkpoint.hf_import import fresh_partial
from megastab.checkpoint.hf_modeling import KIND, own_config, own_homes, write_code
from megastab.checkpoint.hf_names import Home, homes_of, shape_of, tenants_of
from megastab.checkpoint.hf_tokenizer import FOLDER as TOKENIZER
from megastab.checkpoint.hf_tokenizer import GENERATION, export_tokenizer
from megastab.checkpoint.init_from import Start, open_start
from megastab.checkpoint.tensor_file import Planned, write_tensors
from megastab.checkpoint.weight_source import VOCABULARY, stored_dtype
from megastab.config.errors import UserError
from megastab.config.schema import ModelConfig
from megastab.config.vocab import padded_vocab

SHARD_BYTES = 5 * 10**9
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Exported:
    """What there is now, in words as well."""

    folder: Path
    kind: str
    """Its ``model_type``."""
    check: dict[str, Any]
    """What ``logit_check.json`` holds."""
    notes: tuple[str, ...]

    @property
    def said(self) -> str:
        """The check in words."""
        if (result := str(self.check["result"])) != "equal":
            return f"logit check {result}"
        return f"logits equal transformers' to {self.check['max_abs_difference']:.1e} (largest {self.check['max_abs_logit']:.3g})"


def bytes_of(text: str) -> int:
    """``5GB`` in bytes (powers of ten, as transformers counts)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|)", text.strip().upper())
    if found is None or not (size := int(float(found[1]) * _UNITS[found[2]])):
        raise UserError(f"--max-shard-size {text} is no size: write one such as 5GB or 500MB")
    return size


def export_model(
    checkpoint: str | Path,
    out: str | Path,
    max_shard_bytes: int = SHARD_BYTES,
    tokenizer: Path | None = None,
    has_code: bool = False,
) -> Exported:
    """Export a checkpoint folder (or an import).

    Args:
        checkpoint: ``runs/NAME/checkpoints/step00000100``.
        out: what to make; it must not exist, and appears when the check has passed.
        max_shard_bytes: of a weights file; a larger tensor has one of its own.
        tokenizer: a ``.model`` file or a folder of tokenizer files; None takes what the run's config names.
        has_code: whether a model no architecture of Hugging Face expresses goes out with a modelling file of its own.

    Raises:
        UserError: Hugging Face cannot express the model (the keys are named), the checkpoint cannot be read, ``out`` exists, or the
            exported model's logits are not ours.
    """
    start, out = open_start(checkpoint), Path(out)
    kind = _kind(start.model, has_code)
    homes = own_homes(start.model) if kind == KIND else homes_of(start.model, kind)
    _check_whole(start, homes)
    partial = fresh_partial(out)
    write_shards(start, homes, partial, max_shard_bytes)
    ids, notes = export_tokenizer(tokenizer or _tokenizer_of(start.path), start.model.vocab_size or 0, partial)
    dtype = str(stored_dtype(start.source)).removeprefix("torch.")
    if kind == KIND:
        write_code(partial)
        _write_json(partial / CONFIG, own_config(start.model, homes, dtype, ids))
    else:
        _write_json(partial / CONFIG, write_model(start.model, kind, dtype, ids))
    _write_json(partial / GENERATION, {"_from_model_config": True, **ids})
    check = hf_check.check_logits(partial, start)
    _write_json(partial / hf_check.FILE, check)
    partial.rename(out)
    return Exported(out, kind, check, tuple(notes))


def _kind(model: ModelConfig, has_code: bool) -> str:
    try:
        return kind_of(model)
    except UserError as error:
        if has_code:
            return KIND
        raise UserError(f"{error}. With --modeling-file it goes out with code of its own (trust_remote_code)") from None


def _check_whole(start: Start, homes: dict[str, Home]) -> None:
    """Every matrix is there in its full size, and no other."""
    known, padded = set(start.source.names()), padded_vocab(start.model.vocab_size or 0)
    cause = "a file of another rank is missing, or from elsewhere"
    if unlike := sorted(homes.keys() ^ known):
        where = "lacks" if unlike[0] in homes else "holds besides its model's weights"
        raise UserError(f"{start.path} {where} {', '.join(unlike[:5])}: {cause}")
    for name, home in homes.items():
        rows = padded if name in VOCABULARY else home.rows
        wanted = (rows,) if home.width is None else (rows, home.width)
        if (found := start.source.shape(name)) != wanted:
            raise UserError(f"{start.path}: {name} is {found}, its model wants {wanted}: {cause}")


def write_shards(start: Start, homes: dict[str, Home], folder: Path, max_shard_bytes: int) -> None:
    """One ``model.safetensors``, or shards and the index of them."""
    tenants = tenants_of(homes)
    entries = {tensor: _planned(tensor, start, homes, names) for tensor, names in tenants.items()}

    def tensor_of(tensor: str) -> Tensor:
        parts = [start.source.rows(name, 0, homes[name].rows) for name in tenants[tensor]]  # rows beyond are padding
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.t() if homes[tenants[tensor][0]].is_turned else whole

    shards = _shards(entries, max_shard_bytes)
    names = [WHOLE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, [entries[tensor] for tensor in shard], map(tensor_of, shard), {"format": "pt"})
    if len(shards) > 1:
        where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(entry.num_bytes for entry in entries.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _planned(tensor: str, start: Start, homes: dict[str, Home], names: list[str]) -> Planned:
    dtypes = {start.source.dtype(name) for name in names}
    if len(dtypes) > 1:
        raise UserError(f"{start.path}: {', '.join(names)} have different dtypes, and are one tensor of Hugging Face")
    return Planned(tensor, dtypes.pop(), shape_of([homes[name] for name in names]))


def _shards(entries: dict[str, Planned], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = []
    room = -math.inf
    for tensor, entry in entries.items():
        room -= entry.num_bytes
        if room < 0:
            shards.append([])
            room = max_shard_bytes - entry.num_bytes
        shards[-1].append(tensor)
    return shards


def _tokenizer_of(checkpoint: Path) -> Path | None:
    """What the run's config names, or an import's; else what came with the weights it started from."""
    for folder in (checkpoint, checkpoint.parent.parent):
        if (folder / CONFIG).is_file():
            block = read_json(folder / CONFIG)["megastab"]
            named, came_with = block["data"]["tokenizer"], Path(block["run"].get("init_from") or folder) / TOKENIZER
            return Path(named) if named else came_with if came_with.is_dir() else None
    return None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
