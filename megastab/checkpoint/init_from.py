"""Weights a run starts from (``run.init_from``), into a module cut however it is, before an engine makes masters of them.

Every rank reads the rows it holds and no others, so there is no collective and no whole model anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from megastab.checkpoint.hf_config import read_model
from megastab.checkpoint.hf_files import CONFIG, HuggingFaceFiles, read_json
from megastab.checkpoint.manifest import FILE
from megastab.checkpoint.weight_source import HuggingFaceWeights, OwnWeights, WeightSource
from megastab.checkpoint.weights import FOLDER
from megastab.config.errors import UserError
from megastab.config.schema import ModelConfig
from megastab.model.init import Held, whole
from megastab.parallel.param_info import Part, info_of
from megastab.wrappers.adapter import Fragment, cut_by_part

# Keys that say how to train or where to begin, not what the network computes.
_FREE = ("init", "dropout")


@dataclass(frozen=True)
class Start:
    """Weights and the model they are of."""

    path: Path
    source: WeightSource
    model: ModelConfig


def open_start(path: str | Path) -> Start:
    """What lies at ``path``: a checkpoint of ours, an import, or a Hugging Face directory.

    Raises:
        UserError: none of these, or one that cannot be used; the message says which and the fix.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"no folder {path}: give a checkpoint, what tools/convert.py import wrote, or a Hugging Face directory")
    if (path / FOLDER).is_dir():
        return Start(path, OwnWeights(path / FOLDER), _model_of(path))
    if path.name == FOLDER and not (path / CONFIG).is_file():
        return Start(path, OwnWeights(path), _model_of(path.parent))
    if (path / "checkpoints").is_dir():
        there = sorted(tag.name for tag in (path / "checkpoints").glob("step*"))
        raise UserError(
            f"{path} is a run folder: name one of its checkpoints, {path / 'checkpoints' / (there[-1] if there else 'step...')}"
        )
    if "megastab" in (files := HuggingFaceFiles(path)).config:
        raise UserError(f"{path} is a megastab folder without weights: give a checkpoint, or what tools/convert.py import wrote")
    return open_hugging_face(files)


def open_hugging_face(files: HuggingFaceFiles, max_seq_len: int | None = None) -> Start:
    """A Hugging Face directory, its tensors checked against its config."""
    kind, model = read_model(files.config, files.folder / CONFIG, max_seq_len)
    files.open_weights()
    return Start(files.folder, HuggingFaceWeights(files, model, kind), model)


def _model_of(folder: Path) -> ModelConfig:
    """From a checkpoint's manifest, or the config an import wrote."""
    try:
        if (folder / FILE).is_file():
            section: Any = read_json(folder / FILE)["model"]
        elif (folder / CONFIG).is_file():
            section = read_json(folder / CONFIG)["megastab"]["model"]
        else:
            raise UserError(f"{folder} has neither {FILE} nor {CONFIG}: nothing says which model its weights are of")
        return ModelConfig.model_validate(section)
    except (KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{folder} does not tell its model: {error}") from None


def check_fit(start: Start, wanted: ModelConfig) -> None:
    """Refuse weights of another model than the run's."""
    free = {*_FREE, "max_seq_len"} if wanted.arch == "llama" else set(_FREE)  # rotary positions are no weights
    there, here = start.model.model_dump(mode="json"), wanted.model_dump(mode="json")
    for models in (there, here):
        if models["activation"] != "topk":
            free.add("activation_topk")
        if models["norm"] != "dyt":
            models.pop("dyt")
    if different := sorted(key for key in there.keys() | here.keys() if key not in free and there.get(key) != here.get(key)):
        said = ", ".join(
            f"megastab.model.{key} = {json.dumps(there.get(key))} there, {json.dumps(here.get(key))} here" for key in different
        )
        raise UserError(f"megastab.run.init_from = {start.path} holds weights of another model ({said}): set these keys to its values")


@torch.no_grad()
def fill(module: nn.Module, start: Start, held: Callable[[nn.Parameter], Held] = whole) -> None:
    """Copy into every parameter what this rank holds of it; all of ``module``'s matrices must be there, in their full size.

    Args:
        module: layers whose parameters carry a ``ParamInfo``.
        start: where from.
        held: where a parameter's local elements live (ZeRO-3 holds a range of each).
    """
    known = set(start.source.names())
    for parameter in module.parameters():
        info = info_of(parameter)
        assert info is not None, "every parameter of a megastab model is described"
        for part in info.parts:
            _check_part(part.name, (part.global_rows, *([info.width] if info.width else [])), start, known)
        local, first = held(parameter)
        for part, begin, here in cut_by_part(info, first, local.numel()):
            _copy(local[here], part, info.width or 1, begin, start.source)


def _check_part(name: str, wanted: tuple[int, ...], start: Start, known: set[str]) -> None:
    if name not in known:
        raise UserError(f"{start.path} lacks {name}: its weights are of another model, or incomplete")
    if (found := start.source.shape(name)) != wanted:
        raise UserError(f"{start.path}: {name} is {found}, the model wants {wanted}: its weights are of another model")


def _copy(target: Tensor, part: Part, width: int, first: int, source: WeightSource) -> None:
    """Into ``target`` (1-D): elements from ``first`` on of the rank-local matrix of ``part``."""
    row, stop = first // width, -(-(first + target.numel()) // width)  # the rows these elements lie in
    rows = source.rows(part.name, part.start + row, part.start + stop).reshape(-1)
    target.copy_(rows[first - row * width :][: target.numel()])


def start_weights(module: nn.Module, path: str, model: ModelConfig, held: Callable[[nn.Parameter], Held] = whole) -> None:
    """``run.init_from``: open, compare, fill."""
    start = open_start(path)
    check_fit(start, model)
    fill(module, start, held)


@torch.no_grad()
def start_masters(fragments: Iterable[Fragment], path: str) -> None:
    """Give fp32 masters the numbers as they are stored: an engine makes them of weights it has rounded to 16 bits."""
    source = open_start(path).source
    for fragment in fragments:
        _copy(fragment.master, fragment.part, fragment.info.width or 1, fragment.start, source)
