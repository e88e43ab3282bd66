"""A trained model on one process, from a checkpoint of any layout, without a DeepSpeed engine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from deepspeed.accelerator import get_accelerator
from pydantic import ValidationError

from megastab.checkpoint.manifest import Manifest
from megastab.checkpoint.store import LATEST
from megastab.checkpoint.weights import FOLDER, load_weights
from megastab.config.errors import UserError
from megastab.config.schema import Megastab, ModelConfig
from megastab.data.tokenizer import Tokenizer
from megastab.model.transformer import Transformer


class Loaded(NamedTuple):
    """A model ready to be asked."""

    model: Transformer
    config: Megastab
    tokenizer: Path | None
    """As the config names it: relative paths are relative to the working directory."""


def find_checkpoint(run: str | Path, tag: str | None = None) -> Path:
    """The folder of a run's checkpoint: the one named ``tag``, or the newest whole one."""
    run = Path(run)
    folder = run / "checkpoints"
    if not run.is_dir():
        raise UserError(f"no run folder {run}: give the megastab.run.dir of a run")
    there = sorted(path.name for path in folder.glob("step*") if path.is_dir())
    if tag is None and (folder / LATEST).is_file():
        tag = (folder / LATEST).read_text().strip()
    if tag is None or not there:
        raise UserError(f"{folder} holds no finished checkpoint (no {LATEST} file): train further, or set megastab.run.save_interval")
    if tag not in there:
        raise UserError(f"{folder} holds no checkpoint {tag}: there are {', '.join(there)}")
    return folder / tag


def checkpoint_of(run_or_checkpoint: str | Path) -> Path:
    """A run's newest checkpoint, or the folder itself where it is no run's."""
    path = Path(run_or_checkpoint)
    return find_checkpoint(path) if (path / "checkpoints").is_dir() else path


def load_for_inference(checkpoint: str | Path, dtype: torch.dtype | None = None) -> Loaded:
    """The whole model of a checkpoint folder (``runs/NAME/checkpoints/step00000100``), in evaluation mode, on the accelerator.

    Args:
        checkpoint: written at any layout; what the model is comes from its manifest, the rest from ``config.json`` of its run.
        dtype: of the weights; ``None`` is fp32 on a CPU and what was saved elsewhere.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise UserError(f"no checkpoint {checkpoint}: give a folder such as runs/NAME/checkpoints/step00000100")
    manifest = Manifest.read(checkpoint)
    config = _config_of(checkpoint.parent.parent / "config.json", manifest)
    model = Transformer(config)
    unused = load_weights(model, checkpoint / FOLDER)
    if unused:
        raise UserError(
            f"{checkpoint} holds {', '.join(sorted(unused)[:5])}, which the model of its manifest has not: a manifest of another model, "
            f"or weights of a newer megastab"
        )
    accelerator = get_accelerator()
    saved = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(manifest.layout.get("precision")), torch.float32)
    wanted = dtype or (torch.float32 if accelerator.device_name() == "cpu" else saved)
    model = model.to(device=accelerator.current_device_name(), dtype=wanted).eval()
    return Loaded(model, config, Path(config.data.tokenizer) if config.data.tokenizer else None)


def _config_of(path: Path, manifest: Manifest) -> Megastab:
    """The run's block, the model replaced by the one the checkpoint was made of."""
    try:
        block = Megastab.model_validate(json.loads(path.read_text())["megastab"])
        return block.model_copy(update={"model": ModelConfig.model_validate(manifest.model)})
    except OSError:
        raise UserError(f"{path} is missing: a checkpoint is read together with the config.json of its run folder") from None
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{path} cannot be read as a run's config: {error}") from None


def tokenizer_of(checkpoint: str | Path, loaded: Loaded) -> Tokenizer:
    """The tokenizer a model was trained with, compared with the fingerprint in the checkpoint."""
    if loaded.tokenizer is None:
        raise UserError(f"{checkpoint} was trained without megastab.data.tokenizer: its tokens have no text")
    tokenizer = Tokenizer(loaded.tokenizer)
    trained_with = Manifest.read(Path(checkpoint)).tokenizer
    if trained_with is not None and trained_with != tokenizer.fingerprint:
        raise UserError(
            f"tokenizer {loaded.tokenizer} (sha256 {tokenizer.fingerprint[:12]}) is not the one {checkpoint} was trained with "
            f"({trained_with[:12]}): put that file back"
        )
    return tokenizer


def text_of(tokenizer: Tokenizer, prompt_ids: list[int], ids: Iterable[int]) -> Iterator[str]:
    """New text as tokens arrive; a character made of several tokens comes out when it is whole."""
    so_far, shown = list(prompt_ids), tokenizer.decode(prompt_ids)
    for token in ids:
        so_far.append(token)
        text = tokenizer.decode(so_far)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    if (rest := tokenizer.decode(so_far)) != shown:
        yield rest[len(shown) :]
