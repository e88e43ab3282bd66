"""What a checkpoint is of: written beside the states and checked before anything is loaded."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megastab.checkpoint.tensor_file import write_text
from megastab.config.config import Config
from megastab.config.errors import UserError
from megastab.config.schema import ModelConfig
from megastab.optim.ortho_adam import ortho_settings

FILE = "megastab.json"
FORMAT = 2  # 1 was DeepSpeed's states


@dataclass(frozen=True)
class Manifest:
    """The facts a resume must agree with, and the position it goes on from."""

    step: int
    """Attempted steps."""
    consumed: int
    """Samples consumed by all ranks."""
    model: dict[str, Any]
    layout: dict[str, Any]
    tokenizer: str | None
    stability: dict[str, Any] = field(default_factory=dict)
    """State of the stability methods: plain values, the same on every rank."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """Its type, and for OrthoAdam what the coordinates of its moments depend on."""
    scalars: dict[str, Any] = field(default_factory=dict)
    """The engine's counters, the schedule's position and the loss scale."""
    files: dict[str, list[int]] = field(default_factory=dict)
    """Bytes and CRC-32 of every other file of the checkpoint, by its path in the folder."""
    skips: list[list[int]] = field(default_factory=list)
    """(first, last) of the samples that rewinds have left out so far."""
    format: int = FORMAT

    @classmethod
    def of(
        cls, config: Config, step: int, consumed: int, tokenizer: str | None = None, stability: dict[str, Any] | None = None
    ) -> Manifest:
        """The manifest of a run at a step."""
        layout = {**asdict(config.layout), "zero_stage": config.zero_stage, "precision": config.precision}
        layout["sequence"] = config.megastab.parallel.sequence
        optimizer = {"type": config.optimizer_type}
        if config.optimizer_type == "OrthoAdam":
            optimizer |= ortho_settings(config.optimizer_params)
        return cls(step, consumed, config.megastab.model.model_dump(mode="json"), layout, tokenizer, stability or {}, optimizer)

    def write(self, tag_folder: Path) -> None:
        """Write into the checkpoint's folder, last of all its files."""
        values = json.loads(json.dumps(asdict(self)))  # as they will be read: keys are text
        write_text(tag_folder / FILE, json.dumps({**values, "checksum": _checksum(values)}, indent=2) + "\n")

    @classmethod
    def read(cls, tag_folder: Path) -> Manifest:
        """Read one; an error if the folder is no checkpoint of ours."""
        path = tag_folder / FILE
        try:
            found = json.loads(path.read_text())
            if found.get("format", 1) > 1 and found.pop("checksum") != _checksum(found):
                raise ValueError("its checksum is another")
            return cls(**found)
        except FileNotFoundError:
            raise UserError(
                f"{tag_folder} is not a megastab checkpoint (no {FILE}): set megastab.run.resume to a checkpoints folder, or none"
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}): set megastab.run.resume to an older checkpoint, or none") from None

    def check(self, wanted: Manifest, where: Path) -> None:
        """Refuse to resume ``wanted`` from this: another model, optimizer or tokenizer. Any layout and precision will do."""
        if self.format != FORMAT:
            raise UserError(
                f"the checkpoint {where} is of format {self.format} (DeepSpeed's own states), and this megastab reads {FORMAT}: finish the "
                "run with the version that wrote it, or set megastab.run.resume=none; its weights folder can still be sampled from"
            )
        there, here = _completed(self.model), _completed(wanted.model)
        for what, mine, theirs, fix in (
            ("model", there, here, "train it in another megastab.run.dir, or set megastab.run.resume=none"),
            ("optimizer", self.optimizer, wanted.optimizer, "its moments mean nothing here: resume with the optimizer it was saved with"),
        ):
            different = _different(mine, theirs)
            if different:
                said = ", ".join(f"{key} {mine.get(key)} there, {theirs.get(key)} here" for key in different)
                raise UserError(f"the checkpoint {where} is of another {what} ({said}): {fix}")
        if self.tokenizer is not None and wanted.tokenizer is not None and self.tokenizer != wanted.tokenizer:
            raise UserError(f"the checkpoint {where} was trained with another tokenizer: set megastab.data.tokenizer to that one")

    def change_of_shape(self, wanted: Manifest) -> str:
        """How ``wanted`` is cut otherwise, in words; empty where it is not."""
        saved = {"context": 1, **self.layout}  # it is younger than the format
        names = [key for key in wanted.layout if key in _different(saved, wanted.layout)]
        return ", ".join(f"{key} {saved.get(key)} -> {wanted.layout[key]}" for key in names)


def _different(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))


def _checksum(values: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _completed(model: dict[str, Any]) -> dict[str, Any]:
    """A model section with the keys an older version did not have at their defaults, which is what it built."""
    try:
        return ModelConfig.model_validate(model).model_dump(mode="json")
    except ValidationError:  # of a newer version: the keys that differ are told
        return model
