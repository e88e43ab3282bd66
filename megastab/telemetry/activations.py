"""Activations on a sampled step: the residual stream after each block and what attention and the MLP add to it, over all ranks.

Hooks stand on the blocks while one step runs and are gone afterwards. Each place is looked at once, at its first forward pass of the step:
that is the first micro-batch of accumulation, and never a recomputation, which comes later. Ranks that hold the same tokens as another
have no hooks. What every rank found is one fp64 table with a place for each layer and, for the largest entries, each rank that holds
tokens, so that the sum of the tables over the job is a gather: one collective, which the caller makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from megastab.data.batches import MicroBatch
from megastab.model.block import Block
from megastab.parallel.grid import Grid
from megastab.telemetry.moments import NUM_SUMS, TOP, Entry, Sketch, Summary, sketch, summary

Site = Literal["residual", "attention", "mlp"]
SITES: tuple[Site, ...] = get_args(Site)


class Place(NamedTuple):
    """Where in the network."""

    layer: int
    """0-based, over all pipeline stages."""
    site: Site
    """``residual`` is the stream after the block; ``attention`` and ``mlp`` are what their last product gives, before an output norm and
    dropout."""


def places_of(block: Block) -> Iterator[tuple[Place, nn.Module]]:
    """The modules whose outputs are looked at. Not attention and MLP themselves: selective recompute calls only what is in them."""
    layer = block.attention.layer
    modules: dict[Site, nn.Module] = {"residual": block, "attention": block.attention.o, "mlp": block.mlp.down}
    return ((Place(layer, site), modules[site]) for site in SITES)


class ActivationWatch:
    """The blocks of this rank.

    Args:
        module: the engine's; its :class:`Block` instances are watched.
        grid: this rank's place.
        num_layers: of the whole model.
    """

    def __init__(self, module: nn.Module, grid: Grid, num_layers: int):
        self.grid, self.num_layers = grid, num_layers
        tp = grid.tp
        self._sketches: dict[Place, Sketch] = {}
        self._batch: MicroBatch | None = None
        holds_tokens = tp.sequence or tp.rank == 0  # without sequence parallel every tp rank holds all tokens
        blocks = [block for block in module.modules() if isinstance(block, Block)] if holds_tokens else []
        self._watched = [found for block in blocks for found in places_of(block)]
        self._num_holders = grid.dp.size * (tp.size if tp.sequence else 1)
        self._holder = grid.dp.rank * (tp.size if tp.sequence else 1) + (tp.rank if tp.sequence else 0)
        self._places = [Place(layer, site) for layer in range(num_layers) for site in SITES]

    @contextmanager
    def watching(self, batch: MicroBatch) -> Iterator[None]:
        """Look at the step inside, whose first micro-batch on this rank is ``batch``."""
        self._sketches, self._batch, handles = {}, batch, list[Any]()
        try:
            handles += [module.register_forward_hook(self._hook(place)) for place, module in self._watched]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, place: Place) -> Callable[[nn.Module, Any, Tensor], None]:
        return partial(self._see, place)

    def _see(self, place: Place, _: nn.Module, __: Any, output: Tensor) -> None:
        if place not in self._sketches and self._batch is not None:
            first = self.grid.tp.rank * output.shape[0] if self.grid.tp.sequence else 0
            self._sketches[place] = sketch(output, first, self._batch.tokens.shape[1], self._batch.first_position)

    # -- over ranks ----------------------------------------------------------------------------------------------------

    @property
    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        fields = len(Entry._fields) + 1  # and whether there is one
        return (len(self._places), NUM_SUMS), (len(self._places), self._num_holders, TOP, fields)

    def table(self) -> Tensor:
        """1-D fp64 on the CPU; the sum of all ranks' tables is for :meth:`read`."""
        sums, top = (torch.zeros(shape, dtype=torch.float64) for shape in self._shapes)
        for i, place in enumerate(self._places):
            if (found := self._sketches.get(place)) is not None:
                sums[i] = found.sums.cpu()
                top[i, self._holder] = self._located(found.top.cpu())
        return torch.cat([sums.flatten(), top.flatten()])

    def _located(self, top: Tensor) -> Tensor:
        """[TOP, 6]: the entries with their samples and token ids, which every rank knows of its own micro-batch."""
        assert self._batch is not None
        out = torch.zeros(TOP, 6, dtype=torch.float64)
        seq = self._batch.tokens.shape[1]
        for row, (magnitude, value, token, channel) in enumerate(top.tolist()):
            if magnitude >= 0:
                sample, position = divmod(int(token), seq)
                ids = int(self._batch.sample_ids[sample]), int(self._batch.tokens[sample, position])
                position += self._batch.first_position
                out[row] = torch.tensor([1.0, value, ids[0], position, channel, ids[1]], dtype=torch.float64)
        return out

    def read(self, table: Tensor) -> dict[Place, Summary]:
        """What the sum of all ranks' tables says, layer by layer."""
        shapes = self._shapes
        split = shapes[0][0] * shapes[0][1]
        sums, top = table[:split].view(shapes[0]), table[split:].view(shapes[1])
        found = {}
        for i, place in enumerate(self._places):
            rows = top[i].flatten(0, 1).tolist()
            entries = [Entry(value, int(s), int(p), int(c), int(t)) for there, value, s, p, c, t in rows if there]
            found[place] = summary(sums[i], entries)
        return found


def newly_massive(found: Mapping[Place, Summary], known: set[int]) -> dict[int, Summary]:
    """Layers whose residual stream holds a massive activation and that are not ``known`` to have had one."""
    return {place.layer: seen for place, seen in found.items() if place.site == "residual" and seen.is_massive and place.layer not in known}
