"""A Hugging Face directory: its config.json and its safetensors, in one file or in shards. Nothing in it is executed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from megastab.checkpoint.safetensors_file import Entry, read_header
from megastab.config.errors import UserError

CONFIG = "config.json"
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What from_pretrained would read besides, and the code that turns it into what we read.
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_TO_SAFETENSORS = 'AutoModelForCausalLM.from_pretrained("{folder}").save_pretrained("{folder}-safetensors")'


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): copy or download it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object: copy or download it again")
    return found


class HuggingFaceFiles:
    """``entries`` tells what there is, ``read`` reads it."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"no Hugging Face directory {self.folder}: give a local folder (a name on the hub is not downloaded)")
        if not (self.folder / CONFIG).is_file():
            raise UserError(f"{self.folder} has no {CONFIG}: give the folder save_pretrained wrote, or a downloaded snapshot")
        self.config = read_json(self.folder / CONFIG)
        self.entries: dict[str, Entry] = {}
        """Every tensor's dtype and shape."""
        self._paths: dict[str, Path] = {}

    def open_weights(self) -> None:
        """Read the headers of all files.

        Raises:
            UserError: pickles only, missing or damaged files, an index that tells of other tensors than the files.
        """
        if (self.folder / INDEX).is_file():
            self._open_shards(read_json(self.folder / INDEX))
        elif (self.folder / WHOLE).is_file():
            self._add(self.folder / WHOLE)
        elif any((self.folder / name).is_file() for name in _PICKLES):
            raise UserError(
                f"{self.folder} holds its weights as pickles (pytorch_model.bin), and opening a pickle runs whatever code is in it: where "
                f"you trust it, write safetensors once with transformers, {_TO_SAFETENSORS.format(folder=self.folder)}, and import that"
            )
        else:
            raise UserError(f"{self.folder} has neither {WHOLE} nor {INDEX}: its weights are missing")

    def _open_shards(self, index: dict[str, Any]) -> None:
        wanted = index.get("weight_map")
        if not isinstance(wanted, dict):
            raise UserError(f"{self.folder / INDEX} has no weight_map: copy or download it again")
        for name in sorted(set(wanted.values())):
            if Path(name).name != name:
                raise UserError(f"{self.folder / INDEX} names {name!r}, which is not a file beside it")
            if not (self.folder / name).is_file():
                raise UserError(f"{self.folder / name} is missing, which {INDEX} names: copy or download it again")
            self._add(self.folder / name)
        if unlike := sorted(wanted.keys() ^ self.entries.keys()):
            where = "the index alone" if unlike[0] in wanted else "the files alone"
            raise UserError(f"{self.folder}: {INDEX} and the files disagree on {', '.join(unlike[:5])} (in {where}): download it again")

    def _add(self, path: Path) -> None:
        for name, entry in read_header(path).items():
            if name in self.entries:
                raise UserError(f"{name} is in {self._paths[name]} and in {path}: leave one of these files")
            self.entries[name], self._paths[name] = entry, path

    def read(self, name: str, *parts: slice) -> Tensor:
        """The part of a tensor that ``parts`` tell, one slice a dimension from the first on."""
        with safe_open(self._paths[name], framework="pt") as file:
            return file.get_slice(name)[parts]
