"""How the ranks of a run are divided: world = tensor x pipeline x data."""

from __future__ import annotations

import os
from dataclasses import dataclass

from megastab.config.errors import UserError
from megastab.config.ranks import dialect_of
from megastab.config.schema import ParallelConfig


@dataclass(frozen=True)
class Layout:
    """Sizes of the three axes; their product is ``world``."""

    world: int
    tensor: int
    pipeline: int
    data: int


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
    model_ranks = parallel.tensor * parallel.pipeline
    if world % model_ranks:
        raise UserError(
            f"megastab.parallel.tensor = {parallel.tensor} times megastab.parallel.pipeline = {parallel.pipeline} is {model_ranks}, "
            f"which does not divide the {world} ranks of this run. Start a multiple of {model_ranks} ranks "
            f"(deepspeed --num_gpus {-(-world // model_ranks) * model_ranks} ...), or lower tensor or pipeline."
        )
    return Layout(world=world, tensor=parallel.tensor, pipeline=parallel.pipeline, data=world // model_ranks)
