"""Attention on a sampled step: every head's largest logit, entropy, and how much of its mass the first key and the sink draw.

Looked at are the first sample of the global step, some positions of it spread evenly (``heads.query_positions``), and every head of every
layer: the same at every layout, and little work. That sample is the first of the first micro-batch of the first data-parallel rank; only
the ranks of that replica look, each at its own layers and heads. A layer is looked at by its first forward pass of the step and no
longer, so never by a recomputation. Their table has a place for each head of the model, so that the sum of the tables over the job is a
gather: one collective, which the caller makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from megastab.model.attention import Attention, Term
from megastab.model.context import Context
from megastab.parallel import collectives
from megastab.parallel.grid import Grid
from megastab.telemetry.heads import FIELDS, Head, first_keys, heads_seen, query_positions


class AttentionWatch:
    """The attention layers of this rank (collective over the pipeline at construction).

    Args:
        module: the engine's; its :class:`Attention` instances are watched.
        grid: this rank's place.
        num_layers: of the whole model.
    """

    def __init__(self, module: nn.Module, grid: Grid, num_layers: int):
        layers = [layer for layer in module.modules() if isinstance(layer, Attention)]
        heads_here = max((layer.num_heads for layer in layers), default=0)
        self._num_heads = grid.tp.size * max(collectives.gather_objects_in(heads_here, grid.pp.group))  # over pp: a stage may have no block
        self._num_layers, self._first_head = num_layers, layers[0].first_head(grid.tp, grid.cp) if layers else 0
        self._watched = layers if grid.samples.rank == 0 else []  # where the first sample of the step is
        self._found: dict[int, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the step inside."""
        self._found = {}
        try:
            for layer in self._watched:
                layer.look = partial(self._see, layer)
            yield
        finally:
            for layer in self._watched:
                layer.look = None

    @torch.no_grad()
    def _see(self, layer: Attention, q_BSNH: Tensor, k_BSKH: Tensor, term: Term, context: Context) -> None:
        layer.look = None
        q_SNH, k_SKH, documents = q_BSNH[0].detach(), k_BSKH[0].detach(), context.document_ids
        last_Q = query_positions(len(q_SNH))
        here_Q = last_Q.to(q_SNH.device)
        first_Q = torch.zeros_like(here_Q) if documents is None else first_keys(documents[0])[here_Q]
        q_QNH = q_SNH[here_Q]
        self._found[layer.layer] = heads_seen(q_QNH, k_SKH, first_Q, last_Q, _sink_logits(layer, q_QNH, term), layer.cap)

    def table(self) -> Tensor:
        """1-D fp64 on the CPU; the sum of all ranks' tables is for :meth:`read`."""
        whole = torch.zeros(self._num_layers, self._num_heads, FIELDS, dtype=torch.float64)
        for layer, found in self._found.items():
            whole[layer, self._first_head : self._first_head + len(found)] = found.cpu()
        self._found = {}
        return whole.flatten()

    def read(self, table: Tensor) -> dict[int, tuple[Head, ...]]:
        """What the sum of all ranks' tables says: by layer, its heads."""
        layers = table.view(self._num_layers, self._num_heads, FIELDS).tolist()
        return {layer: tuple(Head(*values) for values in heads) for layer, heads in enumerate(layers)}


def _sink_logits(layer: Attention, q_QNH: Tensor, term: Term) -> Tensor | None:
    """[N, Q] fp32; None without a sink."""
    heads, width = q_QNH.shape[1:]
    if layer.has_softmax1:
        return q_QNH.new_zeros(heads, len(q_QNH), dtype=torch.float32)
    if term is None:
        return None
    if isinstance(term, Tensor):
        return term.float()[:, None].expand(-1, len(q_QNH))
    key_NH = term[0].float().repeat_interleave(heads // len(term[0]), dim=0)
    logits_NQ = torch.einsum("qnh,nh->nq", q_QNH.float(), key_NH) * width**-0.5
    return logits_NQ if layer.cap is None else (logits_NQ / layer.cap).tanh() * layer.cap
