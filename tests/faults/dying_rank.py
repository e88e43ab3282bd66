"""A job whose rank 1 raises, or is killed, while rank 0 waits for it in a collective."""

import os
import signal
import sys

import torch

from megastab.engine.launch import run_job
from megastab.parallel import collectives


def work() -> None:
    rank, _ = collectives.world()
    collectives.barrier()
    if rank == 1 and "kill" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1:
        raise RuntimeError("the disk of rank 1 is full")
    collectives.sum_scalars([float(torch.ones(1))], collectives.new_groups([[0, 1]]))


if __name__ == "__main__":
    sys.exit(run_job(work))
