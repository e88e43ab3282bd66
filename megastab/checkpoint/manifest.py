"""What a checkpoint is of: written beside the states and checked before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megastab.config.config import Config
from megastab.config.errors import UserError
from megastab.config.schema import ModelConfig

FILE = "megastab.json"
FORMAT = 1


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
    skips: list[list[int]] = field(default_factory=list)
    """(first, last) of the samples that rewinds have left out so far."""
    format: int = FORMAT

    @classmethod
    def of(
        cls, config: Config, step: int, consumed: int, tokenizer: str | None = None, stability: dict[str, Any] | None = None
    ) -> Manifest:
        """The manifest of a run at a step."""
        layout = {**asdict(config.layout), "zero_stage": config.zero_stage, "precision": config.precision}
        return cls(step, consumed, config.megastab.model.model_dump(mode="json"), layout, tokenizer, stability or {})

    def write(self, tag_folder: Path) -> None:
        """Write into the checkpoint's folder."""
        (tag_folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, tag_folder: Path) -> Manifest:
        """Read one; an error if the folder is no checkpoint of ours."""
        path = tag_folder / FILE
        try:
            found = json.loads(path.read_text())
            return cls(**found)
        except FileNotFoundError:
            raise UserError(
                f"{tag_folder} is not a megastab checkpoint (no {FILE}): set megastab.run.resume to a checkpoints folder, or none"
            ) from None
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): set megastab.run.resume to an older checkpoint, or none") from None

    def check(self, wanted: Manifest, where: Path) -> None:
        """Refuse to resume ``wanted`` from this: another model, or a layout whose states would not fit."""
        there, here = _completed(self.model), _completed(wanted.model)
        for what, mine, theirs, fix in (
            ("model", there, here, "train it in another megastab.run.dir, or set megastab.run.resume=none"),
            ("layout", self.layout, wanted.layout, "resume with the layout it was saved with"),
        ):
            different = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
            if different:
                said = ", ".join(f"{key} {mine.get(key)} there, {theirs.get(key)} here" for key in different)
                raise UserError(f"the checkpoint {where} is of another {what} ({said}): {fix}")
        if self.tokenizer is not None and wanted.tokenizer is not None and self.tokenizer != wanted.tokenizer:
            raise UserError(f"the checkpoint {where} was trained with another tokenizer: set megastab.data.tokenizer to that one")


def _completed(model: dict[str, Any]) -> dict[str, Any]:
    """A model section with the keys an older version did not have at their defaults, which is what it built."""
    try:
        return ModelConfig.model_validate(model).model_dump(mode="json")
    except ValidationError:  # of a newer version: the keys that differ are told
        return model
