"""Going back to the last good checkpoint, to a copy in memory or to where the run began from, and what a run leaves out since:
``skips.json`` in the run folder.

The file is written the moment a run goes back, after the checkpoints of the steps taken back are gone: a crash before it meets the same
samples again and goes back again; a crash after it knows what to leave out. Reading it twice, or beside a checkpoint that knows of it,
changes nothing.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastab.checkpoint import store
from megastab.checkpoint.manifest import Manifest
from megastab.config.errors import TrainingEnded, UserError
from megastab.data.skips import Skips
from megastab.parallel import collectives
from megastab.stability.controller import go_back
from megastab.stability.policy import Verdict
from megastab.stability.record import Event

if TYPE_CHECKING:
    from megastab.engine.trainer import Trainer

FILE = "skips.json"


@dataclass(frozen=True)
class Rewind:
    """One return to a checkpoint."""

    from_step: int
    """Last step taken before it."""
    to_step: int
    """Step of the checkpoint."""
    samples: tuple[int, int]
    """First and last sample left out since: those of the bad steps."""
    reason: str

    def event(self, checkpoint: str) -> Event:
        """A line of ``events.jsonl``."""
        first, last = self.samples
        why = f"{self.reason}: went back to {checkpoint}, and leave out samples {first} to {last}"
        return Event(self.from_step, "rewind", why, {"to_step": self.to_step, "samples": [first, last]})


class Rewinds:
    """All rewinds of a run folder, in order."""

    def __init__(self, folder: Path, taken: list[Rewind] | None = None):
        self.path = folder / FILE
        self.taken = taken or []
        self.has_said_no_checkpoint = False

    @classmethod
    def read(cls, folder: Path) -> Rewinds:
        """Those of a run folder; an error if the file cannot be understood."""
        path = folder / FILE
        if not path.exists():
            return cls(folder)
        try:
            lines = json.loads(path.read_text())["rewinds"]
            return cls(folder, [Rewind(**{**line, "samples": _pair(line["samples"])}) for line in lines])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} cannot be read ({error}): mend it, or move it away and write the samples to leave out as megastab.data.skip"
            ) from None

    @property
    def skips(self) -> Skips:
        """What they leave out."""
        return Skips.of(rewind.samples for rewind in self.taken)

    def in_vain(self, from_step: int) -> int:
        """Rewinds so far since the run last got beyond every step it had gone back from, if it now goes back from ``from_step``."""
        furthest, count = 0, 0
        for rewind in self.taken:
            count = 1 if rewind.from_step > furthest else count + 1
            furthest = max(furthest, rewind.from_step)
        return count if from_step <= furthest else 0

    def add(self, rewind: Rewind, is_writer: bool) -> None:
        """Keep one more, on the disk before anything else happens."""
        self.taken.append(rewind)
        if is_writer:
            aside = self.path.with_suffix(".new")
            aside.write_text(json.dumps({"rewinds": [asdict(each) for each in self.taken]}, indent=2) + "\n")
            os.replace(aside, self.path)


def _pair(value: Any) -> tuple[int, int]:
    first, last = value
    return int(first), int(last)


def rewind(trainer: Trainer, verdict: Verdict) -> None:
    """Go back to the last good checkpoint or copy in memory and leave out the samples of the bad steps (collective over the job).

    Raises:
        TrainingEnded: the run has gone back too often without getting any further.
    """
    assert verdict.first_bad_step is not None
    train, rewinds, folder = trainer.data.train, trainer.rewinds, trainer.folder
    num_bad = trainer.step - verdict.first_bad_step + 1
    samples = train.skips.back(train.consumed, num_bad * trainer.config.global_batch), train.consumed - 1
    trainer.tell_saved(trainer.saver.finish())  # what is still on its way may be the one
    damaged: list[str] = []
    good = store.newest_before(trainer.checkpoints, verdict.first_bad_step, damaged.append, trainer.origin)
    trainer.tell([Event(trainer.step, "warning", said) for said in damaged])
    held = trainer.snapshots.newest_before(verdict.first_bad_step)
    if good is None and held is None:
        if not rewinds.has_said_no_checkpoint:
            why = f"{verdict.rewind}, and there is no checkpoint before them to go back to: the run goes on"
            trainer.tell([Event(trainer.step, "warning", why, {"samples": list(samples)})])
        rewinds.has_said_no_checkpoint = True
        return
    _end_if_in_vain(trainer, verdict)
    from_step = trainer.step
    if held is not None and (good is None or held.manifest.step >= Manifest.read(good).step):
        manifest, where = trainer.restore(held), f"the copy in memory of step {held.manifest.step}"
    else:
        assert good is not None
        is_own = good.parent == trainer.checkpoints
        manifest, where = trainer.load(good), good.name if is_own else str(good)
    go_back(trainer.built.controller, manifest.stability)
    if good is None or good.parent != trainer.checkpoints:  # a crash from here on must find a checkpoint here, and none of the bad steps
        trainer.save()
        trainer.tell_saved(trainer.saver.finish())
        good = trainer.checkpoints / store.tag_of(manifest.step)
    if folder.is_writer and good.exists():
        store.go_back(good)
    taken = Rewind(from_step, manifest.step, samples, verdict.rewind)
    rewinds.add(taken, folder.is_writer)
    trainer.forget_after(manifest.step)
    trainer.tell([taken.event(where)])
    trainer.leave_out(rewinds.skips)


def _end_if_in_vain(trainer: Trainer, verdict: Verdict) -> None:
    count = trainer.rewinds.in_vain(trainer.step)
    if count >= trainer.config.megastab.stability.policy.max_rewinds:
        collectives.fail_alike(
            f"training stopped: {verdict.rewind}, after {count} rewinds without a step beyond the furthest (policy.max_rewinds). "
            f"Resume with a lower optimizer.params.lr, or look at the samples that {trainer.rewinds.path} names",
            TrainingEnded,
        )
