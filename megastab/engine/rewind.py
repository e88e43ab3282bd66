"""What a run has taken back, and the samples it leaves out since: ``skips.json`` in the run folder.

It is written the moment a run goes back, after the checkpoints of the steps taken back are gone: a crash before it meets the same samples
again and goes back again; a crash after it knows what to leave out. Reading it twice, or beside a checkpoint that knows of it, changes
nothing.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megastab.config.errors import UserError
from megastab.data.skips import Skips
from megastab.stability.record import Event

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
