"""The same run whoever launches it: deepspeed, torchrun, mpirun, DeepSpeed's openmpi launcher, and srun as the batch script calls it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT, Finished, curve, environment, launch
from tests.ports import free_port

FOLDER = Path(sys.executable).parent
# One machine of two cores, in a container whose user is root: what mpirun wants to be told before it starts there.
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
TP2 = "megastab.parallel.tensor=2"


def run(*command: str, **variables: str) -> Finished:
    env = {**environment(), **AS_ROOT, "MEGASTAB_ENV": "active", **variables}
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240)
    return Finished(done.returncode, done.stdout)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, float, float, float]]]:
    """The deepspeed launcher's curve, made once."""
    return {}


def same_as_deepspeed(reference: dict[str, list[tuple[int, float, float, float]]], config: Path, run_folder: Path) -> bool:
    """Whether a run's curve is, to the last bit, what the deepspeed launcher gives at the same layout."""
    if not reference:
        done = launch("--deepspeed_config", str(config), TP2, f"megastab.run.dir={run_folder}-deepspeed")
        assert done.code == 0, done.text
        reference["curve"] = curve(Path(f"{run_folder}-deepspeed"))
    return len(reference["curve"]) == 6 and curve(run_folder) == reference["curve"]


def test_torchrun(reference: dict, config_file: Path, tmp_path: Path) -> None:
    job = ["megastab/pretrain.py", "--deepspeed_config", str(config_file), TP2]
    done = run(str(FOLDER / "torchrun"), "--standalone", "--nproc_per_node", "2", *job)
    assert done.code == 0, done.text
    assert same_as_deepspeed(reference, config_file, tmp_path / "run")


def test_mpirun_through_its_script(reference: dict, config_file: Path, tmp_path: Path) -> None:
    done = run("bash", "run_scripts/mpirun.sh", str(config_file), TP2, RANKS="2")
    assert done.code == 0, done.text
    assert same_as_deepspeed(reference, config_file, tmp_path / "run")


def test_deepspeeds_openmpi_launcher(reference: dict, config_file: Path, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 slots=2\n")
    job = ["megastab/pretrain.py", "--deepspeed_config", str(config_file), TP2]
    one_host = ["--force_multi", "--no_ssh_check", "--launcher_args=--mca btl_tcp_if_include lo"]
    one_host += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    done = run(str(FOLDER / "deepspeed"), "--hostfile", str(hosts), "--launcher", "openmpi", *one_host, *job)
    assert done.code == 0, done.text
    assert same_as_deepspeed(reference, config_file, tmp_path / "run")


FAKE_SRUN = """#!/usr/bin/env bash
# Slurm's side of a step on one host, with the variables it sets: two tasks of the command that follows the options.
# Where a task's code ends the others, theirs is what srun gives (Slurm 22.05 was seen to): 128 + SIGTERM.
ended=143
while [[ "$1" == --* ]]; do [ "$1" != --kill-on-bad-exit=0 ] || ended="${FAKE_CODE:-}"; shift; done
[ -z "${FAKE_CODE:-}" ] || exit "$ended"
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_NTASKS=2 SLURM_STEP_TASKS_PER_NODE="2" SLURM_LAUNCH_NODE_IPADDR=127.0.0.1
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" &
SLURM_PROCID=0 SLURM_LOCALID=0 "$@"
code=$?
wait $! || code=$?
exit $code
"""
# It has more hosts to name than anybody reads.
FAKE_SCONTROL = """#!/usr/bin/env bash
[ "$1" != show ] || { echo 127.0.0.1; sleep 0.2; echo 127.0.0.2; exit; }
echo "$@" >> "$FAKE_SCONTROL_LOG"
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """What a batch script finds: the job's variables, and srun and scontrol on PATH."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in {"srun": FAKE_SRUN, "scontrol": FAKE_SCONTROL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    number = str(free_port() - 20000)  # the script takes this port
    job = {"SLURM_JOB_ID": number, "SLURM_JOB_NODELIST": "localhost", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_PROCID": "0"}
    return {**job, "PATH": f"{folder}:{environment()['PATH']}", "FAKE_SCONTROL_LOG": str(tmp_path / "scontrol.log")}


def test_the_batch_script_under_srun(reference: dict, config_file: Path, tmp_path: Path, slurm: dict[str, str]) -> None:
    done = run("bash", "run_scripts/slurm.sbatch", str(config_file), TP2, **slurm)
    assert done.code == 0, done.text
    assert same_as_deepspeed(reference, config_file, tmp_path / "run")
    assert not (tmp_path / "scontrol.log").exists()


@pytest.mark.parametrize(("code", "is_queued_again"), [("85", True), ("1", False)])
def test_only_a_saved_job_is_queued_again(tmp_path: Path, slurm: dict[str, str], code: str, is_queued_again: bool) -> None:
    assert shutil.which("bash")
    done = run("bash", "run_scripts/slurm.sbatch", "any.json", **slurm, FAKE_CODE=code)
    assert done.code == int(code), done.text
    log = tmp_path / "scontrol.log"
    assert (log.read_text().split() == ["requeue", slurm["SLURM_JOB_ID"]]) if is_queued_again else not log.exists()


def test_a_hostfile_that_cannot_be_used_starts_nothing(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 slots=2\r\n127.0.0.1 slots=two\r\n")
    done = run("bash", "run_scripts/multi_node.sh", "any.json", HOSTFILE=str(hosts), NODE_RANK="0", MASTER_ADDR="127.0.0.1")
    assert done.code == 2 and done.text.count("error: ") == 1 and "line 2, '127.0.0.1 slots=two'" in done.text, done.text
    assert "launch.py" not in done.text
