"""Each launcher's variables become the five names torch reads."""

from __future__ import annotations

import pytest

from megastab.config.errors import UserError
from megastab.config.ranks import DEFAULT_PORT, adopt, dialect_of

MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
SLURM = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
PLACE = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}


def adopted(**environ: str) -> dict[str, str]:
    adopt(environ)
    return environ


def test_nobody_launched_this() -> None:
    found = adopted()
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")


def test_mpi_tells_the_place_but_not_the_address() -> None:
    found = adopted(**MPI)
    assert {key: found[key] for key in PLACE} == PLACE and "MASTER_ADDR" not in found
    assert adopted(**MPI, MASTER_ADDR="a")["MASTER_PORT"] == DEFAULT_PORT


def test_slurm_with_its_launch_node_or_an_exported_address() -> None:
    found = adopted(**SLURM, SLURM_LAUNCH_NODE_IPADDR="10.0.0.1")
    assert {key: found[key] for key in PLACE} == PLACE and found["MASTER_ADDR"] == "10.0.0.1"
    assert adopted(**SLURM, SLURM_LAUNCH_NODE_IPADDR="10.0.0.1", MASTER_ADDR="a")["MASTER_ADDR"] == "a"
    with pytest.raises(UserError, match="MASTER_ADDR is not set"):
        adopted(**SLURM)


def test_a_batch_script_is_no_rank() -> None:
    assert dialect_of({"SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}) is None


def test_the_deepspeed_launcher_inside_a_slurm_step_wins() -> None:
    inside = {**SLURM, "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    found = adopted(**inside)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["MASTER_PORT"]) == ("2", "4", "2", "1")


@pytest.mark.parametrize(
    ("change", "said"),
    [({"OMPI_COMM_WORLD_RANK": "x"}, "OMPI_COMM_WORLD_RANK = 'x'"), ({"OMPI_COMM_WORLD_RANK": "8"}, "OMPI_COMM_WORLD_RANK = 8")],
)
def test_what_makes_no_sense_is_named(change: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        adopted(**{**MPI, **change})
