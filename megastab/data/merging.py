"""Finished parts, in the order of the input, to ``<prefix>.bin/.idx/.json``: the files appear together, the index last."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megastab.config.errors import UserError
from megastab.data.finished import Split, read_part
from megastab.data.index_file import token_dtype, write_index
from megastab.data.shards import Job
from megastab.data.sidecar import Sidecar, bits_per_byte
from megastab.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def publish(job: Job, names: Sequence[str], prefix: Path) -> dict[str, Sidecar]:
    """Merge the parts of these names and put the result under its name; the sidecar of every prefix written."""
    outputs = _merge(job, names)
    sidecars = {_final(prefix, output.split): output.finish(job.tokenizer) for output in outputs}
    for final, sidecar in sidecars.items():
        if not sidecar.documents:
            raise UserError(f"no document for {final} (valid_fraction {job.valid_fraction}); give more text or change the fraction")
    for output, final in zip(outputs, sidecars, strict=True):
        Path(f"{final}.idx").unlink(missing_ok=True)  # an older index must never meet the new tokens
        for suffix in (".bin", ".json", ".idx"):
            output.path.with_suffix(suffix).replace(f"{final}{suffix}")
    return sidecars


def _merge(job: Job, names: Sequence[str]) -> list[_Output]:
    outputs = [_Output(job, split) for split in job.splits]
    num_empty = 0
    for name in names:
        part = read_part(job.folder, name)
        if part is None:
            raise UserError(f"{job.folder}/{name}.npz: is missing or damaged; start the same command again")
        num_empty += part.num_empty
        for output in outputs:
            output.append(job.folder / f"{name}.{output.split}", part.splits[output.split])
    if num_empty:
        logger.warning("skipped %d empty documents", num_empty)
    return outputs


class _Output:
    """One split under construction."""

    def __init__(self, job: Job, split: str) -> None:
        self.split = split
        self.path = job.folder / f"merged-{split}"
        self.path.with_suffix(".bin").write_bytes(b"")
        self.lengths: list[np.ndarray] = []
        self.counts = np.zeros(job.tokenizer.vocab_size, np.int64)
        self.text_bytes = 0

    def append(self, path: Path, share: Split) -> None:
        """Copy a part's tokens."""
        with open(path, "rb") as source, open(self.path.with_suffix(".bin"), "ab") as target:
            start = target.tell()
            shutil.copyfileobj(source, target, 1 << 20)
            if target.tell() - start != share.num_bytes:
                raise UserError(f"{path}: is {target.tell() - start} bytes and not {share.num_bytes}; start the same command again")
        self.lengths.append(share.lengths)
        self.counts[share.seen] += share.counts
        self.text_bytes += share.text_bytes

    def finish(self, tokenizer: Tokenizer) -> Sidecar:
        """Write index and sidecar."""
        lengths = np.concatenate(self.lengths)
        write_index(self.path.with_suffix(".idx"), lengths, token_dtype(tokenizer.vocab_size))
        score = bits_per_byte(self.counts, self.text_bytes)
        sidecar = Sidecar(
            tokenizer.fingerprint, tokenizer.vocab_size, len(lengths), int(lengths.sum(dtype=np.int64)), self.text_bytes, score
        )
        sidecar.write(self.path.with_suffix(".json"))
        return sidecar


def _final(prefix: Path, split: str) -> str:
    return str(prefix) if split == "all" else f"{prefix}_{split}"
