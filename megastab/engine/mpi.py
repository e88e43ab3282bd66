"""Where rank 0 listens, asked over MPI: ``mpirun python megastab/pretrain.py`` tells ranks who they are, but not that.

Not DeepSpeed's own discovery: it counts local ranks by the order of ranks, which Open MPI's mapping need not follow, and then refuses
what it counted.
"""

from __future__ import annotations

import os

from megastab.config.errors import UserError
from megastab.config.ranks import DEFAULT_PORT
from megastab.engine.network import free_port, own_address


def agree_on_address() -> None:
    """Set MASTER_ADDR and MASTER_PORT to an address and a free port of rank 0's host (collective over MPI's world).

    Raises:
        UserError: mpi4py finds no MPI library, or this launcher's is another one.
    """
    try:
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
    except (ImportError, RuntimeError) as error:
        raise UserError(f"mpi4py finds no MPI to ask for the first host's address ({error}): {_FIX}") from None
    rank, world = comm.Get_rank(), comm.Get_size()
    if (str(rank), str(world)) != (os.environ["RANK"], os.environ["WORLD_SIZE"]):
        raise UserError(
            f"the launcher says rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}, mpi4py says {rank} of {world}: it was built for "
            f"another MPI than this launcher's; {_FIX}"
        )
    is_one_host = len(set(comm.allgather(MPI.Get_processor_name()))) == 1
    mine = ("127.0.0.1" if is_one_host else own_address(), free_port()) if rank == 0 else None
    address, port = comm.bcast(mine, root=0)
    os.environ["MASTER_ADDR"] = address
    os.environ.setdefault("MASTER_PORT", str(port))


_FIX = f"install mpi4py for this machine's MPI, or export the address: mpirun -x MASTER_ADDR=HOST -x MASTER_PORT={DEFAULT_PORT} ..."
