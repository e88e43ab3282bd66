"""The files of a checkpoint in the making, and the moment it counts. No collectives: a thread may do all of this."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from megastab.checkpoint import index
from megastab.checkpoint.index import Index
from megastab.checkpoint.manifest import FILE, Manifest
from megastab.checkpoint.pieces import STATES, WEIGHTS, Piece, Share
from megastab.checkpoint.tensor_file import settle, write_tensors, write_text

LATEST = "latest"  # names the newest checkpoint
NEXT = "latest.next"  # names one that is about to get its name, and the one that is ``latest`` until it has
PARTIAL = ".partial"  # of a folder that is no checkpoint, or none any more


class NotSaved(Exception):
    """A checkpoint could not be written. The run is unharmed, and so are older checkpoints."""


def partial_of(folder: Path, tag: str) -> Path:
    """Where a checkpoint is made."""
    return folder / f"{tag}{PARTIAL}"


def latest_in(folder: Path) -> str:
    """What ``latest`` names; empty where there is none."""
    try:
        return (folder / LATEST).read_text().strip()
    except OSError:  # of a first checkpoint, or lost
        return ""


def unnamed(folder: Path) -> list[Path]:
    """The checkpoint that got its name but is not ``latest``, because a crash came between: one, or none.

    Not whatever is newer than ``latest``: that may be left of a run that was taken back to an older one.
    """
    try:
        tag, before = (folder / NEXT).read_text().split(" ")
    except (OSError, ValueError):
        return []
    is_one = tag != before == latest_in(folder) and (folder / tag / FILE).exists()
    return [folder / tag] if is_one and before else []


def prepare(folder: Path, tag: str) -> None:
    """Clear away what crashes left behind and make room for a new one."""
    for left in folder.glob(f"*{PARTIAL}"):
        shutil.rmtree(left)
    for part in (STATES, WEIGHTS):
        (partial_of(folder, tag) / part).mkdir(parents=True)


STATES_NOTE, WEIGHTS_NOTE = "rank{:04d}.json", "weights{:04d}.json"


def missing_notes(aside: Path, world: int, note: str = STATES_NOTE) -> bool:
    """Whether some rank is still writing."""
    return not all((aside / note.format(rank)).exists() for rank in range(world))


def refuse(aside: Path, rank: int, shares: Sequence[Share], why: str, note: str = STATES_NOTE) -> None:
    """Leave a note that this rank could not write; what it had written makes room for it."""
    for share in shares:
        if share.file:
            (aside / share.file).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        write_text(aside / note.format(rank), json.dumps({"refused": why}))


def refusals(aside: Path, world: int, note: str = STATES_NOTE) -> list[str]:
    """Why ranks could not write; a rank without a note could not even say."""
    found = []
    for rank in range(world):
        try:
            said = json.loads((aside / note.format(rank)).read_text()).get("refused")
        except OSError as error:
            said = f"rank {rank} left no note ({error.strerror})"
        found += [said] if said else []
    return found


def write(aside: Path, rank: int, shares: Sequence[Share], tag: str, note: str = STATES_NOTE) -> None:
    """Write this rank's files and, when they are on the disk, a note of them.

    Raises:
        OSError: after every share was taken to its end, which may be collective.
    """
    failure: OSError | None = None
    files: dict[str, list[int]] = {}
    for share in shares:
        if share.file and failure is None:
            try:
                seal = write_tensors(aside / share.file, share.entries, share.tensors, {"checkpoint": tag, **share.metadata})
                files[share.file] = list(astuple(seal))
            except OSError as error:
                failure = error
        for _ in share.tensors:
            pass
    if failure is not None:
        raise failure
    pieces = {share.file: share.pieces for share in shares if share.file}
    write_text(aside / note.format(rank), json.dumps({"files": files, "pieces": pieces}))


def pieces_told(aside: Path) -> dict[str, list[Piece]]:
    """What all ranks have written so far, by file."""
    notes = [json.loads(path.read_text()) for path in _notes(aside)]
    return {name: [Piece(*values) for values in held] for note in notes for name, held in note["pieces"].items()}


def _notes(aside: Path) -> list[Path]:
    return sorted([*aside.glob("rank*.json"), *aside.glob("weights*.json")])


def complete(folder: Path, tag: str, manifest: Manifest) -> None:
    """Make a checkpoint of what all ranks have written: index, manifest, name."""
    aside, final = partial_of(folder, tag), folder / tag
    files: dict[str, Any] = {}
    for note in _notes(aside):
        files |= json.loads(note.read_text())["files"]
    pieces = pieces_told(aside)
    if faults := Index(pieces).faults():
        raise RuntimeError(f"the checkpoint {final} would not be whole: {'; '.join(faults[:5])}")
    files[index.FILE] = list(astuple(write_text(aside / index.FILE, index.text_of(pieces))))
    for note in _notes(aside):
        note.unlink()
    for part in (STATES, WEIGHTS):
        settle(aside / part)
    replace(manifest, files=dict(sorted(files.items()))).write(aside)
    settle(aside)
    if final.exists():  # a run that went back takes this step again
        final.rename(folder / f"{tag}.replaced{PARTIAL}")
    write_text(folder / NEXT, f"{tag} {latest_in(folder)}")
    os.rename(aside, final)
    settle(folder)
    shutil.rmtree(folder / f"{tag}.replaced{PARTIAL}", ignore_errors=True)
