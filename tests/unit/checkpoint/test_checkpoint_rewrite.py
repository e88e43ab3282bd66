"""A checkpoint in other files is the same checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megastab.checkpoint import store, verify
from megastab.checkpoint.index import Reader
from megastab.checkpoint.manifest import Manifest
from megastab.checkpoint.reshard import rewrite
from megastab.checkpoint.weights import merged_weights
from megastab.config.errors import UserError
from tests.launching import tool
from tests.unit.checkpoint.test_checkpoint_resume import WHOLE, runs


@pytest.fixture
def checkpoint() -> Path:
    """Of two ZeRO-1 ranks in bf16: every matrix is cut, masters and moments are fp32, weights bf16."""
    return runs("bf16")[0] / "straight" / "checkpoints" / store.tag_of(WHOLE)


def states(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Every matrix's master and moments, whole."""
    reader, found = Reader(checkpoint), {}
    for name, size in reader.index.sizes.items():
        for kind in [reader.index.master_kind(name), *reader.index.kinds(name)]:
            found[name, kind] = torch.empty(size)
            reader.fill(found[name, kind], name, kind, 0)
    return found


@pytest.mark.parametrize("num_files", [1, 3])
def test_it_is_the_same_in_other_files(checkpoint: Path, tmp_path: Path, num_files: int) -> None:
    made = rewrite(checkpoint, tmp_path / "again", num_files, progress=False)
    assert len(list((made / "states").iterdir())) == len(list((made / "weights").iterdir())) == num_files
    assert verify.damage(made) == []
    before, after = states(checkpoint), states(made)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    old, new = dict(merged_weights(checkpoint / "weights")), dict(merged_weights(made / "weights"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) and old[name].dtype == new[name].dtype == torch.bfloat16 for name in old)
    mine, theirs = Reader(checkpoint).index, Reader(made).index
    assert all(mine.scalars(name) == theirs.scalars(name) != {} for name in mine.sizes)  # the step counts
    assert Manifest.read(made).stability == Manifest.read(checkpoint).stability
    assert store.find(str(tmp_path / "again"), tmp_path, Manifest.read(checkpoint)) == made


def test_the_tool_and_what_it_refuses(checkpoint: Path, tmp_path: Path) -> None:
    done = tool("tools/convert.py", "reshard", str(checkpoint), str(tmp_path / "out"), "--files", "2")
    assert done.code == 0 and f"megastab.run.resume={tmp_path / 'out'}" in done.text, done.text
    done = tool("tools/convert.py", "reshard", str(checkpoint), str(tmp_path / "out"))
    assert done.code == 1 and "error:" in done.text and "exists" in done.text and "Traceback" not in done.text


@pytest.mark.parametrize("num_files", [0, 10_000])
def test_files_there_cannot_be(checkpoint: Path, tmp_path: Path, num_files: int) -> None:
    with pytest.raises(UserError, match=f"--files {num_files}: give 1 to"):
        rewrite(checkpoint, tmp_path / "again", num_files, progress=False)
    assert not (tmp_path / "again").exists()


def test_a_damaged_one_is_not_copied(checkpoint: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))
    (damaged / "states" / "rank0001.safetensors").unlink()
    with pytest.raises(UserError, match="rank0001.safetensors is missing"):
        rewrite(damaged, tmp_path / "again", progress=False)
    assert not (tmp_path / "again").exists()
