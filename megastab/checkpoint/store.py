"""Saving and loading a run's checkpoints. ``latest`` is written last, by renaming, so that what it names is whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from megastab.checkpoint.manifest import FILE, Manifest
from megastab.checkpoint.weights import FOLDER, save_weights
from megastab.config.errors import UserError
from megastab.parallel import collectives
from megastab.parallel.grid import Grid
from megastab.wrappers.bind import quiet

LATEST = "latest"


def tag_of(step: int) -> str:
    """Folder name of the checkpoint after ``step``."""
    return f"step{step:08d}"


def save(engine: Any, grid: Grid, folder: Path, manifest: Manifest, keep_last: int | None = None) -> Path:
    """Write one checkpoint (collective over the job) and return its folder."""
    tag = tag_of(manifest.step)
    is_first = collectives.world()[0] == 0
    if is_first:
        (folder / tag).mkdir(parents=True, exist_ok=True)
    collectives.barrier()
    save_weights(engine.module, grid, folder / tag / FOLDER)
    with quiet():
        engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    collectives.barrier()  # every rank's files are there
    if is_first:
        manifest.write(folder / tag)
        _publish(folder, tag)
        _prune(folder, tag, keep_last)
    collectives.barrier()
    return folder / tag


def _publish(folder: Path, tag: str) -> None:
    temporary = folder / f"{LATEST}.new"
    temporary.write_text(tag)
    os.replace(temporary, folder / LATEST)


def _prune(folder: Path, newest: str, keep_last: int | None) -> None:
    """Keep the newest ``keep_last`` up to ``newest``; later ones (a run that went back and has not caught up) are left alone."""
    if keep_last is not None:
        for old in sorted(path for path in folder.glob("step????????") if path.name <= newest)[:-keep_last]:
            shutil.rmtree(old)


def go_back(where: Path) -> None:
    """Make ``where`` the newest checkpoint of its folder (on one rank): those after it, of steps taken back, are deleted."""
    _publish(where.parent, where.name)
    for later in where.parent.glob("step????????"):
        if later.name > where.name:
            shutil.rmtree(later)


def find(resume: str, own: Path, wanted: Manifest) -> Path | None:
    """The checkpoint to resume ``wanted`` from: ``auto`` is the run's own newest or None, ``none`` is None, else a path that must hold one.

    A path may be a checkpoints folder or one checkpoint in it. What is found has been checked to fit.
    """
    if resume == "none":
        return None
    where = _newest(own if resume == "auto" else Path(resume))
    if where is not None:
        Manifest.read(where).check(wanted, where)
    elif resume != "auto":
        raise UserError(f"megastab.run.resume = {resume}: no checkpoint there (no {LATEST} file); give a checkpoints folder, auto, or none")
    return where


def _newest(folder: Path) -> Path | None:
    if (folder / LATEST).exists():
        tag = (folder / LATEST).read_text().strip()
        if not (folder / tag).is_dir():
            raise UserError(f"{folder / LATEST} names {tag}, which is not there: set megastab.run.resume to another checkpoint, or none")
        return folder / tag
    return folder if folder.is_dir() and folder.name.startswith("step") else None


def newest_before(folder: Path, step: int) -> Path | None:
    """The newest whole checkpoint made before ``step``; None where there is none."""
    whole = (path for path in sorted(folder.glob("step????????"), reverse=True) if (path / FILE).exists())  # the manifest comes last
    return next((path for path in whole if path.name < tag_of(step)), None)


def load(engine: Any, where: Path) -> Manifest:
    """Load a checkpoint that was found to fit into the engine (collective over the job) and return its manifest."""
    with quiet():
        path, _ = engine.load_checkpoint(str(where.parent), tag=where.name)
    if path is None:
        raise UserError(f"DeepSpeed found no states in {where}: set megastab.run.resume to another checkpoint, or none")
    return Manifest.read(where)
