"""Joining the job, whichever launcher started this process."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from megastab.config.errors import UserError
from megastab.config.ranks import adopt
from megastab.engine.meeting import meet
from megastab.engine.mpi import agree_on_address
from megastab.engine.network import interface_towards
from megastab.parallel import collectives
from megastab.wrappers.bind import quiet, skip_shm_build

# What a scheduler can go by; 2 and 86 are UserError's and TrainingEnded's, 87 is the watch's. docs/faults.md has the table.
DONE, FAILED, STOPPED = 0, 1, 85


def start_job() -> None:
    """Join the job (collective). A process nobody launched is a job of one rank."""
    adopt()
    # Read when the accelerator starts: one queue keeps a communication kernel from overtaking the product it must overlap with (tensor
    # parallel). Here, because launchers carry few variables to other hosts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # DeepSpeed calls torch's collectives by names torch 2.13 is about to change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        skip_shm_build()
        if "OMP_NUM_THREADS" not in os.environ:  # ranks on one machine share its cores
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_SIZE", os.environ.get("WORLD_SIZE", "1")))))
    else:
        accelerator.set_device(own_device(accelerator.device_count()))
    if "MASTER_ADDR" not in os.environ:
        agree_on_address()
    backend = accelerator.communication_backend_name()
    if backend == "gloo" and (interface := interface_towards(os.environ["MASTER_ADDR"])):
        # Left alone gloo takes the address its host's name resolves to, which many systems set to loopback.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    store = meet()
    with quiet():
        deepspeed.init_distributed(dist_backend=backend)
    del store  # not before


def own_device(devices: int) -> int:
    """This rank's, of those it sees on its host.

    Raises:
        UserError: this is the first rank there is none for.
        PeerFailed: another rank of the host says so.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local < devices:
        return local
    message = (
        f"rank {os.environ['RANK']} on {socket.gethostname()} is number {local} of its host and sees {devices} device"
        f"{'' if devices == 1 else 's'}: start as many ranks on a host as it has, and let each see all of them (slots= in a hostfile; with "
        "Slurm --gpus-per-node and --ntasks-per-node, not --gpus-per-task; CUDA_VISIBLE_DEVICES)."
    )
    raise UserError(message) if local == devices else collectives.PeerFailed(message)


def run_job(work: Callable[[], int | None]) -> int:
    """Join the job, do ``work``, leave together; the exit code, which is what ``work`` returned.

    A failing rank says why first and is then ended hard: the backend's threads, or a collective nobody else will join, must not keep it
    alive, because the launcher ends the other ranks when this one is gone.
    """
    try:
        start_job()
        code = work() or DONE
        collectives.leave()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except collectives.PeerFailed as error:
        code = error.exit_code
        time.sleep(1.0)  # let the rank that knows why say it before the launcher acts on this exit
    except BaseException:
        rank = os.environ.get("RANK", "0")
        print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr)
        code = FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
