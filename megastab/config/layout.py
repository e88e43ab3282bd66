"""How the ranks of a run are divided: world = tensor x context x data x pipeline."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from megastab.config.errors import UserError
from megastab.config.ranks import dialect_of
from megastab.config.schema import ParallelConfig


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes; their product is ``world``."""

    world: int
    tensor: int
    pipeline: int
    data: int
    """Shares a step's samples are cut into."""
    context: int = 1
    """Ranks that share each sequence."""

    @property
    def copies(self) -> int:
        """Ranks that work on the same weights: what gradients are summed over, and ZeRO cuts the optimizer over."""
        return self.data * self.context


def world_from_environment() -> int:
    """What the launcher says, or 1 when nothing launched us."""
    dialect = dialect_of(os.environ)
    name = dialect.world if dialect is not None else "WORLD_SIZE"
    said = os.environ.get(name, "1")
    if not said.isdecimal():
        raise UserError(f"{name} = {said!r} in the environment must be the number of ranks.")
    return int(said)


def divide(world: int, parallel: ParallelConfig) -> Layout:
    """The layout of ``world`` ranks; data parallelism is what remains."""
    if world < 1:
        raise UserError(f"the number of ranks is {world}: WORLD_SIZE, or world_size, must be 1 or more.")
    sizes = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "context": parallel.context}
    ranks = math.prod(sizes.values())
    if world % ranks:
        named = {name: size for name, size in sizes.items() if size > 1 or name != "context"}
        lower = " or ".join(name for name, size in named.items() if size > 1)
        said = " times ".join(f"megastab.parallel.{name} = {size}" for name, size in named.items())
        raise UserError(
            f"{said} is {ranks}, which does not divide the {world} ranks of this run. Start a multiple of {ranks} ranks "
            f"(deepspeed --num_gpus {-(-world // ranks) * ranks} ...), or lower {lower}."
        )
    return Layout(world, parallel.tensor, parallel.pipeline, world // ranks, parallel.context)
