"""Joining the job, whichever launcher started this process."""

from __future__ import annotations

import os

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from megastab.wrappers.bind import quiet, skip_shm_build

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
MPI_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")


def start_job() -> None:
    """Join the job (collective). A process nobody launched is a job of one rank."""
    if not any(name in os.environ for name in (*LAUNCHER_VARIABLES, *MPI_VARIABLES)):
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        skip_shm_build()
        if "OMP_NUM_THREADS" not in os.environ:  # ranks on one machine share its cores
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_SIZE", os.environ.get("WORLD_SIZE", "1")))))
    else:
        accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with quiet():
        deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name())
