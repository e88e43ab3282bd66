"""Tiny models and checkpoints of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megastab.config.config import Config
from megastab.config.load import load_config
from megastab.model.init import init_weights
from megastab.model.transformer import Transformer

VOCAB = 400


def tiny_config(
    arch: str = "llama",
    world: int = 1,
    run: Path | str = "runs/tiny",
    tokenizer: str | None = None,
    model: dict[str, Any] | None = None,
    **top: Any,
) -> Config:
    block = {
        "model": {
            "arch": arch,
            "num_layers": 2,
            "hidden_size": 32,
            "num_heads": 4,
            "num_kv_heads": 2 if arch == "llama" else 4,
            "ffn_hidden_size": 64,
            "max_seq_len": 24,
            "vocab_size": VOCAB,
            "init": {"std": 0.2},  # wide enough for attention to matter to the next token
            **(model or {}),
        },
        "data": {"tokenizer": tokenizer},
        "run": {"dir": str(run), "total_steps": 2, "seed": 7},
        **top.pop("megastab", {}),
    }
    deepspeed = {"train_batch_size": 2 * world, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, **top}
    return load_config({**deepspeed, "megastab": block}, world_size=world)


def tiny_model(arch: str = "llama", draw_biases: bool = True, **model: Any) -> Transformer:
    config = tiny_config(arch, model=model).megastab
    model = Transformer(config)
    init_weights(model, config.model, config.run.seed)
    if draw_biases and arch == "gpt":  # biases start at 0, where a wrong one would not be seen
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    for name, parameter in model.named_parameters():
        if ".sink." in name:
            torch.nn.init.normal_(parameter)  # so also sinks
    return model


def write_checkpoint(run: str, overrides: dict[str, Any], tokenizer: str | None = None) -> str:
    """On every rank of a job: build an engine on random weights and save it; the checkpoint's folder."""
    from megastab.checkpoint import store
    from megastab.checkpoint.manifest import Manifest
    from megastab.engine.build import build
    from megastab.parallel import collectives
    from megastab.parallel.grid import Grid
    from megastab.telemetry.sinks import RunFolder

    rank, world = collectives.world()
    config = tiny_config(world=world, run=run, **overrides)
    parallel = config.megastab.parallel
    grid = Grid.create(parallel.tensor, parallel.pipeline, parallel.sequence, config.megastab.model.num_kv_heads)
    folder = RunFolder(run, is_writer=rank == 0)
    folder.write_config(config.resolved())
    built = build(config, grid)
    return str(store.save(built.adapter, grid, folder.path / "checkpoints", Manifest.of(config, 3, 6, tokenizer)))
