"""Section ``megastab.parallel.activation_offload``: activations that wait for backward outside the device's memory."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat, model_validator

from megastab.config.section import Section

OffloadKind = Literal["none", "cpu", "ssd"]
OffloadAmount = Literal["measured", "all"]


class ActivationOffloadConfig(Section):
    """What blocks save for backward is moved out during forward and fetched before backward needs it (SSDTrain, arXiv 2408.10013).
    Each rank keeps its own; the last block of a stage stays, being needed at once. See docs/offload.md."""

    kind: OffloadKind = "none"
    """``cpu``: to pinned host memory (in CPU runs a mere copy, which saves nothing); ``ssd``: to a file in ``folder``."""
    folder: str | None = None
    """A folder on a local disk, for ``ssd``; made if it is not there. The file has no name once it is open, so that nothing is left."""
    max_gb: PositiveFloat | None = None
    """Most that may be outside at once, per rank, in 10^9 bytes; what is beyond stays. ``null``: no limit."""
    amount: OffloadAmount = "measured"
    """``measured``: no more than can be written and read back in time, by the bandwidth seen so far; ``all``: everything, and forward
    waits for the disk (memory before speed)."""
    min_kb: NonNegativeFloat = 256.0
    """Smaller tensors stay, in 1024 bytes."""

    @model_validator(mode="after")
    def _folder_goes_with_ssd(self) -> ActivationOffloadConfig:
        if self.kind == "ssd" and not self.folder:
            raise ValueError('kind = "ssd" needs a place: set folder to a directory on a local disk, or kind to "cpu"')
        if self.kind != "ssd" and self.folder is not None:
            raise ValueError(f'folder = "{self.folder}" is not read with kind = "{self.kind}": set kind to "ssd", or folder to null')
        return self
