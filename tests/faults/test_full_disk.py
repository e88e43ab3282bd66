"""A disk that fills up in the middle of a save, for real: a tmpfs in a mount namespace of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT, environment

SIZE = 480  # KiB: a checkpoint of the test's model takes about 280
CAN_MOUNT = shutil.which("unshare") is not None and subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
VERIFY = "from pathlib import Path; from megastab.checkpoint.verify import damage; print(damage(Path('checkpoints/step00000003')))"


@pytest.mark.skipif(not CAN_MOUNT, reason="no user namespaces here: RLIMIT_FSIZE stands in (test_checkpoint_background)")
@pytest.mark.parametrize("how", ["sync", "async"])
def test_full_disk_costs_one_checkpoint_and_not_the_run(how: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"""set -e
        mount -t tmpfs -o size={SIZE}k tmpfs {disk}
        {sys.executable} -m tests.faults.full_disk {disk}/run {how}
        cd {disk}/run
        find checkpoints -maxdepth 1 | sort
        cat checkpoints/latest events.jsonl
        {sys.executable} -c "{VERIFY}"
    """
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checkpoints\ncheckpoints/latest\ncheckpoints/step00000003\nstep00000003{" in done.stdout
    assert "step00000006 could not be written (rank" in done.stdout and "No space left on device" in done.stdout
    assert '"step": 6, "kind": "warning"' in done.stdout and done.stdout.rstrip().endswith("[]"), done.stdout
