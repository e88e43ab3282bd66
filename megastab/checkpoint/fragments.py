"""The walk over a rank's fragments: from a checkpoint's files into them, and into and from copies in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megastab.checkpoint.index import Reader
from megastab.checkpoint.pieces import first_of, size_of
from megastab.config.errors import UserError
from megastab.wrappers.adapter import Adapter
from megastab.wrappers.states import OptimizerState, load_scalar_state, scalar_state


@torch.no_grad()
def fill(adapter: Adapter, folder: Path) -> None:
    """Fill masters and moments from a checkpoint of any layout, then make the low-precision weights of them (collective over the job).

    Raises:
        UserError: a matrix the checkpoint has not, or of another size.
    """
    reader, state = Reader(folder), OptimizerState(adapter)
    for fragment in adapter.fragments():
        name, first = fragment.part.name, first_of(fragment)
        if (size := reader.index.sizes.get(name)) != size_of(fragment):
            raise UserError(f"{folder} has {size or 'no'} elements of {name}, the model {size_of(fragment)}: another model's checkpoint")
        reader.fill(fragment.master, name, reader.index.master_kind(name), first)
        kinds = reader.index.kinds(name)
        views = state.prepared(fragment, kinds)
        for kind in kinds:
            reader.fill(views[kind], name, kind, first)
        state.load_scalars(fragment, reader.index.scalars(name))
    adapter.publish()


@torch.no_grad()
def snapshot(adapter: Adapter, device: str | None = None) -> dict[str, Any]:
    """A copy of everything :func:`restore` needs, on ``device`` or where the masters are: this rank's own, for the same engine."""
    state = OptimizerState(adapter)
    held = [(_clones({"master": f.master, **state.tensors(f)}, device), state.scalars(f)) for f in adapter.fragments()]
    return {"fragments": held, "scalars": scalar_state(adapter)}


@torch.no_grad()
def restore(adapter: Adapter, kept: dict[str, Any]) -> None:
    """Go back to a :func:`snapshot`, which stays as it is (collective over the job)."""
    state = OptimizerState(adapter)
    for fragment, (tensors, scalars) in zip(adapter.fragments(), kept["fragments"], strict=True):
        moments = {name: values for name, values in tensors.items() if name != "master"}
        fragment.master.copy_(tensors["master"])
        views = state.prepared(fragment, moments)
        for name, values in moments.items():
            views[name].copy_(values)
        state.load_scalars(fragment, scalars)
    adapter.publish()
    load_scalar_state(adapter, kept["scalars"])


def _clones(tensors: dict[str, Tensor], device: str | None) -> dict[str, Tensor]:
    return {name: values.detach().to(device or values.device, copy=True) for name, values in tensors.items()}
