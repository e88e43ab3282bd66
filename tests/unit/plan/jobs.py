"""What real engines hold, measured on every rank of a job."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from megastab.config.config import Config
from megastab.config.load import load_config
from tests.memory import PeakOfTensors


def small_config(world: int = 1, arch: str = "llama", model: dict[str, Any] | None = None, **top: Any) -> Config:
    """Small, yet large enough for alignment and scalars to be far below a per cent."""
    block = {
        "model": {
            "arch": arch,
            "num_layers": 4,
            "hidden_size": 64,
            "num_heads": 4,
            "num_kv_heads": 2 if arch == "llama" else 4,
            "max_seq_len": 32,
            "vocab_size": 500,
            **(model or {}),
        },
        "parallel": top.pop("parallel", {}),
        "run": {"dir": "runs/plan", "total_steps": 2},
    }
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}}
    deepspeed = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4, "optimizer": optimizer, **top}
    return load_config({**deepspeed, "megastab": block}, world_size=world)


def held_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of memory that ``tensors`` cover, shared ones once."""
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors if t is not None)
    total = end = 0
    for start, stop in spans:
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def measure_engine(arguments: dict[str, Any]) -> dict[str, Any]:
    """Build an engine, take two steps, and count what it holds.

    Gradients are counted where the norm is known, and where they are summed outside backward (ZeRO 2 and 3 hold them in buckets
    then, which are counted apart) also after the last backward: the larger of the two.
    """
    from megastab.data.batches import MicroBatch
    from megastab.engine.build import build
    from megastab.engine.train_step import Stepper
    from megastab.parallel import collectives
    from megastab.parallel.grid import Grid
    from megastab.wrappers.pipeline import before_reduction

    config = small_config(collectives.world()[1], **arguments)
    parallel, model = config.megastab.parallel, config.megastab.model
    grid = Grid.create(parallel.tensor, parallel.pipeline, parallel.sequence, model.num_kv_heads, parallel.context)
    built = build(config, grid)
    engine = built.engine
    gradients: list[int] = []
    built.adapter.on_norm(lambda norm: gradients.append(held_bytes(_gradients(engine))))
    if not built.adapter.reduces_in_backward:
        before_reduction(built.adapter, lambda: gradients.append(held_bytes(_gradients(engine))))
    buffers = Buffers(engine)
    tokens = torch.randint(0, 500, (config.micro_batch, model.max_seq_len), generator=torch.Generator().manual_seed(grid.samples.rank))
    batch = MicroBatch(tokens, tokens, torch.ones(tokens.shape), torch.arange(config.micro_batch), None).share(grid.cp.rank, grid.cp.size)
    for _ in range(2):
        Stepper(engine, config, grid).train([batch] * config.accumulation)
    return {
        "stage": grid.pp.rank,
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()),
        "weights": held_bytes(_weights(engine)),
        "gradients": max(gradients),
        "masters": held_bytes(_masters(engine)),
        "moments": sum(held_bytes([state]) for state in _moments(engine)),
        "buckets": buffers.standing + buffers.copies,
        "gathered": buffers.gathered,
        "wrapper": type(engine.optimizer).__name__,
        "bounds": getattr(engine.module, "parts", None),
    }


def measure_engines(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One engine after another on the ranks of one job."""
    return [measure_engine(arguments) for arguments in cases]


class Buffers:
    """The largest sums of bytes seen in backward: buckets that stand, what a reduction makes beside them, and released weights."""

    def __init__(self, engine: Any):
        self.engine, self.standing, self.copies, self.gathered = engine, 0, 0, 0
        optimizer = engine.optimizer
        for owner, name in ((optimizer, "allreduce_bucket"), (optimizer, "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads")):
            if hasattr(owner, name):
                self._wrap(owner, name)
        if not hasattr(optimizer, "ipg_buckets"):
            self._wrap(engine, "allreduce_bucket")
        for parameter in engine.module.parameters():
            parameter.register_hook(lambda gradient: self._look())

    def _wrap(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._look()
            with PeakOfTensors() as seen:
                result = original(*args, **kwargs)
            self.copies = max(self.copies, seen.peak)
            return result

        setattr(owner, name, watched)

    def _look(self) -> None:
        buckets = getattr(self.engine.optimizer, "ipg_buckets", {}).values()
        held = [t for bucket in buckets for t in (bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer])]
        self.standing = max(self.standing, held_bytes(held))
        released = [p.data for p in self.engine.module.parameters() if hasattr(p, "ds_tensor") and not p.ds_persist]
        self.gathered = max(self.gathered, sum(held_bytes([p]) for p in released))


def _weights(engine: Any) -> Iterator[Tensor]:
    for p in engine.module.parameters():
        yield p.data  # ZeRO 3: whole where the parameter is kept, empty where it is released
        if hasattr(p, "ds_tensor"):
            yield p.ds_tensor.data


def _gradients(engine: Any) -> Iterator[Tensor | None]:
    optimizer = engine.optimizer
    for p in engine.module.parameters():
        yield from (p.grad, getattr(p, "_hp_grad", None), getattr(p, "grad_accum", None))
    yield from getattr(optimizer, "fp32_groups_gradients_flat", [])
    for group in getattr(optimizer, "averaged_gradients", {}).values():
        yield from (group if isinstance(group, list) else [group])
    yield getattr(optimizer, "grad_partitions_flat_buffer", None)


def _masters(engine: Any) -> list[Tensor]:
    names = ("fp32_groups_flat_partition", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    return [master for name in names for master in getattr(engine.optimizer, name, [])]


def _moments(engine: Any) -> Iterator[Tensor]:
    client = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for state in client.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim() > 0)
