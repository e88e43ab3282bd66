"""Saving, finding and loading a run's checkpoints.

A checkpoint is written into a folder of another name, by every rank; the first rank adds the index and, last, the manifest with the
size and checksum of every file, and renames the folder. ``latest`` follows. A crash at any moment leaves the older ones as they were.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from megastab.checkpoint import fragments, verify
from megastab.checkpoint.manifest import FILE, Manifest
from megastab.checkpoint.pieces import states_share, weights_share
from megastab.checkpoint.tensor_file import settle, write_text
from megastab.checkpoint.writing import LATEST, NEXT, NotSaved, complete, latest_in, partial_of, prepare, unnamed, write
from megastab.parallel import collectives
from megastab.parallel.grid import Grid
from megastab.wrappers.adapter import Adapter
from megastab.wrappers.states import load_scalar_state, scalar_state

TAGS = "step????????"


def tag_of(step: int) -> str:
    """Folder name of the checkpoint after ``step``."""
    return f"step{step:08d}"


def step_of(tag: str) -> int:
    """The step a folder is named for."""
    return int(tag.removeprefix("step"))


def save(
    adapter: Adapter, grid: Grid, folder: Path, manifest: Manifest, keep_last: int | None = None, keep_every: int | None = None
) -> Path:
    """Write one checkpoint (collective over the job) and return its folder.

    Raises:
        NotSaved: on every rank, where any could not write; what it had written is removed and older checkpoints stand.
    """
    rank, _ = collectives.world()
    tag = tag_of(manifest.step)
    aside = partial_of(folder, tag)
    agree(aside, lambda: prepare(folder, tag) if rank == 0 else None)
    shares = (states_share(adapter, grid, rank), weights_share(adapter.engine.module, grid))
    agree(aside, lambda: write(aside, rank, shares, tag))
    whole = replace(manifest, scalars=scalar_state(adapter))
    agree(aside, lambda: publish(folder, tag, whole, keep_last, keep_every) if rank == 0 else None)
    return folder / tag


def agree(aside: Path, do: Callable[[], None]) -> None:
    """Do something on every rank; where it fails on any, nothing of the checkpoint is left and all know."""
    failure, is_ours = "", False
    try:
        do()
    except Exception as error:
        failure, is_ours = f"rank {collectives.world()[0]}: {error}", not isinstance(error, OSError)
    failures = [each for each in collectives.gather_objects((failure, is_ours)) if each[0]]
    if failures:
        if collectives.world()[0] == 0:
            shutil.rmtree(aside, ignore_errors=True)
        told = not_saved(aside, [said for said, _ in failures])
        if any(is_ours for _, is_ours in failures):  # no disk's fault: a next one would fail as well
            raise RuntimeError(str(told))
        raise told


def not_saved(aside: Path, failures: Sequence[str]) -> NotSaved:
    """What to say of a checkpoint that could not be written."""
    return NotSaved(f"the checkpoint {aside.with_suffix('')} could not be written ({'; '.join(failures[:3])}); older ones stand")


def publish(folder: Path, tag: str, manifest: Manifest, keep_last: int | None, keep_every: int | None) -> None:
    """On the first rank, when every rank has written: index, manifest, the name, ``latest``, and the older ones that are to go."""
    complete(folder, tag, manifest)
    write_text(folder / LATEST, tag)
    settle(folder)
    (folder / NEXT).unlink(missing_ok=True)
    _prune(folder, tag, keep_last, keep_every)


def _prune(folder: Path, newest: str, keep_last: int | None, keep_every: int | None) -> None:
    """Keep the newest ``keep_last`` up to ``newest`` and multiples of ``keep_every``.

    Later ones (a run that went back and has not caught up) are left alone.
    """
    if keep_last is not None:
        for old in sorted(path for path in folder.glob(TAGS) if path.name <= newest)[:-keep_last]:
            if keep_every is None or step_of(old.name) % keep_every:
                (old / FILE).unlink(missing_ok=True)  # from here on it is none
                shutil.rmtree(old, ignore_errors=True)


def name_as_latest(where: Path) -> None:
    """Do what a crash kept from being done: have ``latest`` name a checkpoint that already has its own name (on one rank)."""
    if where in unnamed(where.parent):
        write_text(where.parent / LATEST, where.name)
        settle(where.parent)
        (where.parent / NEXT).unlink(missing_ok=True)


def go_back(where: Path) -> None:
    """Make ``where`` the newest checkpoint of its folder (on one rank): those after it, of steps taken back, are deleted."""
    (where.parent / NEXT).unlink(missing_ok=True)
    write_text(where.parent / LATEST, where.name)
    settle(where.parent)
    for later in where.parent.glob(TAGS):
        if later.name > where.name:
            (later / FILE).unlink(missing_ok=True)  # from here on it is none
            shutil.rmtree(later, ignore_errors=True)


def find(resume: str, own: Path, wanted: Manifest, tell: Callable[[str], None] = lambda said: None) -> Path | None:
    """The checkpoint to resume ``wanted`` from (collective over the job): whole, its files verified, and of the same model.

    Args:
        resume: ``auto`` is the run's own newest that is whole, or None; ``none`` is None; else a path that must hold one: a checkpoints
            folder, or one checkpoint in it.
        own: the run's checkpoints folder.
        wanted: what is to be resumed.
        tell: given, on every rank, a sentence for each damaged one that was passed over.

    Raises:
        UserError, PeerFailed: none at a path that was asked for, a damaged one there, none but damaged ones, or another model's.
    """
    if resume == "none":
        return None
    is_auto = resume == "auto"
    there = collectives.gather_objects(_candidates(own if is_auto else Path(resume)))[0]  # as the first rank sees them
    if not there and not is_auto:
        collectives.fail_alike(
            f"megastab.run.resume = {resume}: no checkpoint there (no {LATEST} file); give a checkpoints folder, auto, or none"
        )
    for where in there:
        faults = _damage(where)
        if not faults:
            with collectives.together("checking a checkpoint"):
                Manifest.read(where).check(wanted, where)
            return where
        said = f"the checkpoint {where} is damaged: {'; '.join(faults[:5])}"
        if not is_auto:
            collectives.fail_alike(f"{said}. Set megastab.run.resume to an older one, auto, or none")
        tell(said)
    if there:
        collectives.fail_alike(f"every checkpoint in {own} is damaged: set megastab.run.resume to another run's, or none")
    return None


def _damage(where: Path) -> list[str]:
    """Each rank looks at its share of the files; all know what all found."""
    return [said for each in collectives.gather_objects(verify.damage(where, *collectives.world())) for said in each]


def _candidates(folder: Path) -> list[Path]:
    """Newest first: what ``latest`` names, or was about to, then what was finished before it."""
    if not folder.is_dir():
        return []
    if folder.name.startswith("step"):
        return [folder]
    finished = sorted((path for path in folder.glob(TAGS) if (path / FILE).exists()), reverse=True)
    if not (newest := latest_in(folder)):
        return finished
    return [*unnamed(folder), folder / newest, *(path for path in finished if path.name < newest)]


def newest_before(folder: Path, step: int, tell: Callable[[str], None] = lambda said: None, origin: Path | None = None) -> Path | None:
    """The newest whole checkpoint made before ``step``, its files verified (collective over the job); None where there is none.

    ``tell`` is given, on every rank, a sentence for each damaged one that was passed over. ``origin`` is where the run began: another
    run's checkpoint, it may be, which comes last.
    """
    made = sorted((path for path in folder.glob(TAGS) if (path / FILE).exists() and path.name < tag_of(step)), reverse=True)
    if origin is not None and origin.parent != folder and origin.name < tag_of(step):
        made.append(origin)
    for where in collectives.gather_objects(made)[0]:  # as the first rank sees them
        if not (faults := _damage(where)):
            return where
        tell(f"the checkpoint {where} is damaged: {'; '.join(faults[:5])}")
    return None


def load(adapter: Adapter, where: Path) -> Manifest:
    """Load a checkpoint that was found to fit, of whatever layout (collective over the job), and return its manifest."""
    manifest = Manifest.read(where)
    fragments.fill(adapter, where)
    load_scalar_state(adapter, manifest.scalars)
    return manifest
