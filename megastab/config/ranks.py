"""What a launcher says about this process, whichever it is, in the five names torch and DeepSpeed read.

``deepspeed`` and ``torchrun`` export them. Open MPI, MPICH and Slurm's srun have names of their own, translated here: rank, number of
ranks, and the place on the host. What they do not say is where rank 0 listens: Slurm's launch node serves where MASTER_ADDR was not
exported; under MPI the ranks ask each other (mpi4py, in ``engine.launch``).
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import NamedTuple

from megastab.config.errors import UserError

DEFAULT_PORT = "29500"  # torch's


class Dialect(NamedTuple):
    """The names one launcher uses."""

    launcher: str
    rank: str
    world: str
    local_rank: str
    local_size: str


DIALECTS = (
    Dialect("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    Dialect("openmpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    Dialect("mpich", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Dialect("slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)


def dialect_of(environ: MutableMapping[str, str]) -> Dialect | None:
    """The launcher that started this process; None where nobody did.

    Slurm is told by its step's variables: a batch script has SLURM_PROCID as well, and is no rank of anything.
    """
    return next((d for d in DIALECTS if d.rank in environ and d.world in environ), None)


def is_first() -> bool:
    """Whether this process is rank 0, by what its launcher says (before there is a job to ask)."""
    dialect = dialect_of(os.environ)
    return dialect is None or os.environ[dialect.rank].strip() == "0"


def adopt(environ: MutableMapping[str, str] | None = None) -> str:
    """Fill RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_SIZE, and what is known of MASTER_ADDR and MASTER_PORT; the launcher's name.

    Raises:
        UserError: a launcher that contradicts itself, or Slurm without an address.
    """
    environ = os.environ if environ is None else environ
    dialect = dialect_of(environ)
    if dialect is None:
        environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        return "none"
    rank, world = _number(environ, dialect.rank), _number(environ, dialect.world)
    if rank >= world:
        raise UserError(f"{dialect.rank} = {rank} but {dialect.world} = {world}: ranks count from 0; start all of them with one launcher")
    environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(_number(environ, dialect.local_rank, rank)))
    here = environ.get(dialect.local_size, "").split("(")[0].split(",")[0]  # Slurm: 4(x2), the first host's
    if here.isdecimal():
        environ.setdefault("LOCAL_SIZE", here)
    if world == 1:
        environ.setdefault("MASTER_ADDR", "127.0.0.1")
        environ.setdefault("MASTER_PORT", "0")
    elif dialect.launcher == "slurm" and "MASTER_ADDR" not in environ:
        if "SLURM_LAUNCH_NODE_IPADDR" not in environ:
            raise UserError("MASTER_ADDR is not set: export the first host's name in the batch script, as run_scripts/slurm.sbatch does")
        environ["MASTER_ADDR"] = environ["SLURM_LAUNCH_NODE_IPADDR"]
    if "MASTER_ADDR" in environ:
        environ.setdefault("MASTER_PORT", DEFAULT_PORT)
    return dialect.launcher


def _number(environ: MutableMapping[str, str], name: str, default: int | None = None) -> int:
    said = environ.get(name, "" if default is None else str(default))
    if not said.isdecimal():
        raise UserError(f"{name} = {said!r} in the environment must be a whole number; the launcher sets it")
    return int(said)
