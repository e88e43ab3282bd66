"""From a config to a DeepSpeed engine with its seams installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from megastab.checkpoint.init_from import start_masters, start_weights
from megastab.config.config import Config
from megastab.config.schema import Megastab
from megastab.engine.offload import Offloader, offload_activations
from megastab.engine.step import complete_gradients
from megastab.model.attention import Attention
from megastab.model.block import Block
from megastab.model.init import Held, init_weights, whole
from megastab.model.logit_watch import LargestLogits
from megastab.model.mlp import MLP
from megastab.model.stages import layer_specs, pipeline_loss
from megastab.model.transformer import Transformer
from megastab.optim.groups import build_optimizer, describe_optimizer
from megastab.optim.ortho_binding import bind_ortho_adam
from megastab.optim.schedules import build_schedule
from megastab.parallel import collectives
from megastab.parallel.grid import Grid
from megastab.stability.controller import Controller, build_controller
from megastab.stability.qk_clip import QKClip, WatchedLayer
from megastab.wrappers.adapter import Adapter
from megastab.wrappers.bind import bind, quiet
from megastab.wrappers.counters import count_samples
from megastab.wrappers.pipeline import StagedModule
from megastab.wrappers.zero3 import held, partitioned_build


@dataclass(frozen=True)
class Built:
    """An engine and what was attached to it."""

    engine: Any
    adapter: Adapter
    controller: Controller
    groups: str
    """The decay groups in words."""
    offload: Offloader | None = None
    """Of activations."""


def build_module(config: Config, grid: Grid, is_new: bool = True) -> nn.Module:
    """The model on this rank's share, its weights drawn or, at the start of a run, ``run.init_from``'s; a stage of a pipeline."""
    block = config.megastab

    def fill(module: nn.Module, where: Callable[[nn.Parameter], Held] = whole) -> None:
        if is_new and block.run.init_from is not None:
            with collectives.together("reading run.init_from"):
                start_weights(module, block.run.init_from, block.model, where)
        else:
            init_weights(module, block.model, block.run.seed, where)

    if grid.pp.size > 1:
        specs, costs = layer_specs(block, grid.tp, grid.cp)
        with quiet():
            module: nn.Module = StagedModule(specs, costs, grid.topology(), pipeline_loss(block, grid.tp))
        fill(module)
    elif config.zero_stage == 3:
        with quiet(), partitioned_build(config.for_engine, grid):
            module = Transformer(block, grid.tp, grid.cp)
        fill(module, held)
    else:
        module = Transformer(block, grid.tp, grid.cp)
        fill(module)
    return module


def compile_blocks(module: nn.Module, is_partitioned: bool = False) -> None:
    """Compile in place what lies between collectives.

    A whole block where that is possible: its graph breaks at each collective by itself. Where parameters are partitioned (ZeRO-3)
    every submodule carries DeepSpeed's gathering hooks, which cannot be traced; there only the parts without parameters are compiled.
    """
    for part in module.modules():
        if isinstance(part, Block) and not is_partitioned:
            part.compile()
        elif isinstance(part, Attention) and is_partitioned and not part.mixes_by_parameters:
            part.mix = torch.compile(part.mix)  # type: ignore[method-assign]
        elif isinstance(part, MLP) and is_partitioned:
            part.activate = torch.compile(part.activate)  # type: ignore[method-assign]


def watch_logits(module: nn.Module, config: Megastab, grid: Grid) -> QKClip | None:
    """QK-clip as the config asks for it, and every attention layer of this rank telling it what its heads reach."""
    wanted, model = config.stability.qk_clip, config.model
    if wanted is None:
        return None
    watched = []
    for attention in module.modules():
        if isinstance(attention, Attention):
            attention.logits = LargestLogits(wanted.threshold)
            watched.append(WatchedLayer(attention.layer, attention.first_head(grid.tp, grid.cp), attention.logits))
    heads = (model.num_layers, model.num_heads, model.num_kv_heads, model.head_dim)
    return QKClip(wanted.threshold, wanted.balance, heads, watched, collectives.job_group())


def build(config: Config, grid: Grid, is_new: bool = True) -> Built:
    """Everything between a checked config and the first step (collective over the job); not ``is_new`` where a checkpoint follows."""
    block = config.megastab
    if block.run.deterministic:
        torch.use_deterministic_algorithms(True)
    module = build_module(config, grid, is_new)
    optimizer = build_optimizer(config.optimizer_type, config.optimizer_params, module.parameters())
    groups = describe_optimizer(optimizer)  # before ZeRO replaces the parameters by flat partitions
    schedule = build_schedule(
        optimizer,
        block.schedule.kind,
        total_steps=config.total_steps,
        warmup_steps=config.warmup_steps,
        min_ratio=block.schedule.min_lr_ratio,
        decay_fraction=block.schedule.decay_fraction,
    )
    with quiet():
        engine, *_ = deepspeed.initialize(
            model=module.to(get_accelerator().current_device_name()) if config.zero_stage < 3 else module,
            optimizer=optimizer,
            lr_scheduler=schedule,
            config=config.for_engine,
            mpu=grid.mpu() if grid.pp.size == 1 else None,
        )
    count_samples(engine, config.global_batch)
    adapter = bind(engine, grid)
    if is_new and block.run.init_from is not None:
        start_masters(adapter.fragments(), block.run.init_from)
    if rotated := bind_ortho_adam(adapter, grid):
        groups = f"{groups}\n  OrthoAdam: {rotated}"
    complete_gradients(adapter)
    if block.run.compile:
        compile_blocks(engine.module, is_partitioned=config.zero_stage == 3)
    offload = offload_activations(engine.module, block.parallel.activation_offload)
    qk_clip = watch_logits(engine.module, block, grid)
    controller = build_controller(adapter, grid, block.stability, config.global_batch, config.tokens_per_step, qk_clip)
    return Built(engine, adapter, controller, groups, offload)
