"""Copies of weights and optimizer in host memory, the last few of them: a rewind need not go back as far as the last checkpoint.

Each rank copies what it owns, so a copy costs 12 bytes a parameter of its share with Adam's moments and fp32 masters, in host memory, and
the time to bring them there. They are lost with the process; what a run leaves out is not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megastab.checkpoint import fragments
from megastab.checkpoint.manifest import Manifest
from megastab.config.schema_stability import PolicyConfig
from megastab.wrappers.adapter import Adapter


@dataclass(frozen=True)
class Snapshot:
    """One copy."""

    manifest: Manifest
    """Where the run was."""
    held: dict[str, Any]


class Snapshots:
    """The ring of them, oldest first; alike on every rank."""

    def __init__(self, config: PolicyConfig, adapter: Adapter):
        self.config, self.adapter = config, adapter
        self.kept: list[Snapshot] = []

    def keep(self, step: int, is_good: bool, manifest: Callable[[], Manifest]) -> None:
        """After a step, on every rank: copy if it is time; never within a row of bad steps, which would push good ones out."""
        if not self.config.snapshots or step % self.config.snapshot_interval or not is_good:
            return
        while len(self.kept) >= self.config.snapshots:
            self.kept.pop(0)  # before there is one more
        self.kept.append(Snapshot(copy.deepcopy(manifest()), fragments.snapshot(self.adapter, "cpu")))

    def newest_before(self, step: int) -> Snapshot | None:
        """The newest made before ``step``."""
        return next((each for each in reversed(self.kept) if each.manifest.step < step), None)

    def restore(self, snapshot: Snapshot) -> Manifest:
        """Go back to one, and forget later ones (collective over the job)."""
        fragments.restore(self.adapter, snapshot.held)
        self.forget_after(snapshot.manifest.step)
        return copy.deepcopy(snapshot.manifest)

    def forget_after(self, step: int) -> None:
        """The run is back at ``step``."""
        self.kept = [each for each in self.kept if each.manifest.step <= step]
