"""From the launcher's ranks to the parallel layout: rank -> (pp, dp, cp, tp), tp fastest, then cp, then dp, then pp.

The cp ranks of a sequence work on the same weights as those of other samples do, so DeepSpeed is shown both as one data-parallel axis:
it averages gradients and cuts the optimizer's states over it. The order is then both DeepSpeed's ``PipeModelDataParallelTopology`` and
megatron-core's, so the two agree on every group. The process groups are megatron-core's ``HyperCommGrid`` ones, made once; DeepSpeed
gets the layout as an ``mpu`` (pp = 1) or a topology (pp > 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megastab.parallel import collectives
from megastab.parallel.collectives import Group


@dataclass(frozen=True)
class Axis:
    """One mesh axis as this rank sees it: its place, the number of places, and the group of ranks along it (None if alone)."""

    rank: int = 0
    size: int = 1
    group: Group = None


@dataclass(frozen=True)
class TensorParallel(Axis):
    """The tensor-parallel axis; with ``sequence`` the residual stream is cut over it by token."""

    sequence: bool = False
    kv_copies_group: Group = None
    """Neighbouring tp ranks that hold the same KV heads, where there are fewer heads than ranks."""

    def copies_group(self, copies: int) -> Group:
        """Group of the ``copies`` ranks that hold the same rows (None if each holds its own)."""
        return self.kv_copies_group if copies > 1 else None


ALONE = TensorParallel()


def kv_copies(kv_heads: int | None, tensor: int) -> int:
    """Ranks that hold each KV head: 1 unless there are fewer heads than tensor-parallel ranks."""
    return 1 if kv_heads is None else max(1, tensor // kv_heads)


@dataclass(frozen=True)
class Grid:
    """This rank's place in the job."""

    tp: TensorParallel = ALONE
    dp: Axis = Axis()
    """All ranks that work on the same share of the weights, whether on other samples or on other positions of the same (dp x cp)."""
    pp: Axis = Axis()
    cp: Axis = Axis()
    """The ranks that share each sequence, within ``dp``."""
    model: Axis = Axis()
    """All ranks that hold parts of one copy of the model (tp x pp)."""
    stage: Axis = Axis()
    """All ranks that hold parts or copies of one pipeline stage (tp x dp)."""

    @property
    def samples(self) -> Axis:
        """Which share of a step's samples this rank works on, of how many; no group."""
        return Axis(self.dp.rank // self.cp.size, self.dp.size // self.cp.size)

    @classmethod
    def create(cls, tensor: int = 1, pipeline: int = 1, sequence: bool = False, kv_heads: int | None = None, context: int = 1) -> Grid:
        """Lay the job out and make its groups (collective). The job must be running (``deepspeed.init_distributed``).

        With ``kv_heads`` fewer than ``tensor``, neighbouring ranks share a head and get a group for its gradient.
        """
        rank, world = collectives.world()
        samples, rest = divmod(world, tensor * context * pipeline)
        if rest or not samples:
            raise ValueError(f"{world} ranks cannot be cut into tensor {tensor} x context {context} x pipeline {pipeline}")
        if world == 1:
            return cls()
        from megatron.core.hyper_comm_grid import HyperCommGrid  # slow to import, and foreign models never need it

        mesh = HyperCommGrid([tensor, context, samples, pipeline], ["tp", "cp", "dp", "pp"])
        data = context * samples

        def group(*dims: str, size: int) -> Group:
            return mesh.create_pg(list(dims)) if size > 1 else None

        copies = kv_copies(kv_heads, tensor)
        copies_group = collectives.new_groups([range(first, first + copies) for first in range(0, world, copies)])
        tp_rank, dp_rank, pp_rank = rank % tensor, rank // tensor % data, rank // (tensor * data)
        return cls(
            tp=TensorParallel(tp_rank, tensor, group("tp", size=tensor), sequence and tensor > 1, copies_group),
            dp=Axis(dp_rank, data, group("cp", "dp", size=data)),
            cp=Axis(dp_rank % context, context, group("cp", size=context)),
            pp=Axis(pp_rank, pipeline, group("pp", size=pipeline)),
            model=Axis(pp_rank * tensor + tp_rank, tensor * pipeline, group("tp", "pp", size=tensor * pipeline)),
            stage=Axis(dp_rank * tensor + tp_rank, tensor * data, group("tp", "cp", "dp", size=tensor * data)),
        )

    def topology(self) -> Any:
        """DeepSpeed's description of the same layout, for ``PipelineModule``."""
        from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

        return PipeModelDataParallelTopology(num_pp=self.pp.size, num_mp=self.tp.size, num_dp=self.dp.size)

    def mpu(self) -> Mpu:
        """DeepSpeed's view of the layout where there is no pipeline; made once (collective over the job then)."""
        return self._mpu

    @cached_property
    def _mpu(self) -> Mpu:
        return Mpu(self)


class Mpu:
    """The names DeepSpeed asks a model-parallel unit for, answered from a :class:`Grid` with pp = 1.

    DeepSpeed wants a real group even of one rank, so lone axes get one (collective over the job).
    """

    def __init__(self, grid: Grid):
        if grid.pp.size != 1:
            raise ValueError("with pipeline stages DeepSpeed takes a topology, not an mpu")
        self._tp, self._dp = grid.tp, grid.dp
        self._tp_group = grid.tp.group or collectives.own_group()
        self._dp_group = grid.dp.group or collectives.own_group()

    def get_model_parallel_rank(self) -> int:
        """Place among the ranks that share one copy of the model."""
        return self._tp.rank

    def get_model_parallel_world_size(self) -> int:
        """Ranks that share one copy of the model."""
        return self._tp.size

    def get_model_parallel_group(self) -> Group:
        """Group of the ranks that share one copy of the model."""
        return self._tp_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        """Which copy of the model this is."""
        return self._dp.rank

    def get_data_parallel_world_size(self) -> int:
        """Copies of the model."""
        return self._dp.size

    def get_data_parallel_group(self) -> Group:
        """Group of the ranks that hold the same part of the model."""
        return self._dp_group
