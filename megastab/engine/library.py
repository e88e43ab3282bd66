"""The library form: stability for anyone's model and loop, with the arguments and return values of ``deepspeed.initialize``.

``initialize`` builds the engine from the same JSON the trainer reads, ``attach`` takes one somebody else built. Both install the seams
of a step (``engine.step``), leave the controller at ``engine.stability``, keep the record of each step at ``engine.stability.last`` and
its state in the engine's own checkpoints. Neither imports megatron-core.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from megastab.config.errors import UserError
from megastab.config.library import LibraryBlock, LibraryConfig, load_block, load_library_config
from megastab.config.source import read_source
from megastab.engine.foreign_grid import grid_of
from megastab.engine.launch import start_job
from megastab.engine.library_looks import WeightLooks
from megastab.engine.processes import HOST
from megastab.engine.step import complete_gradients
from megastab.optim.groups import build_optimizer
from megastab.optim.ortho_adam import OrthoAdam
from megastab.optim.ortho_binding import bind_ortho_adam, refuse_strangers
from megastab.parallel import collectives
from megastab.parallel.foreign import without_role
from megastab.parallel.grid import Grid
from megastab.parallel.param_info import info_of
from megastab.stability.controller import Controller, build_controller
from megastab.stability.events import events_of_step
from megastab.stability.record import StepRecord
from megastab.telemetry.rank_times import RankTimes, rank_times
from megastab.telemetry.sampler import Sample
from megastab.wrappers.adapter import Adapter
from megastab.wrappers.bind import bind, quiet

STATE_KEY = "megastab"  # of a checkpoint's client_state
ORDINARY = ("clip", "rescale", "norm_spike")  # events that are logged at level INFO; the others are warnings
log = logging.getLogger("megastab")


class LibraryController(Controller):
    """A controller that writes the step's record itself, because the loop is somebody else's."""

    last: StepRecord | None = None
    """The step just taken; its tokens (0) only the loop knows, and its loss (nan) where the loop has not set ``read_loss``."""
    sample: Sample | None = None
    """The latest look inside: its step, and by name what was seen of each matrix. None before the first."""
    looks: WeightLooks | None = None
    rank_times: RankTimes | None = None
    """Every rank's own seconds; its ``last`` is the latest window. None on one rank, and where ``telemetry`` does not ask for it."""
    _lr: float | None = None
    _ended: float = 0.0

    def watch(self) -> None:
        """Note each step of the engine from now on."""
        engine = self.adapter.engine
        name = "train_batch" if isinstance(engine, deepspeed.PipelineEngine) else "step"
        inner = getattr(engine, name)

        def stepped(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            if self._lr is not None:  # a norm was formed: this call was the boundary of a step
                self._note(self._lr)
            return result

        setattr(engine, name, stepped)
        self._ended = time.perf_counter()
        self.adapter.on_norm(self._read_lr)

    def _read_lr(self, norm: float) -> None:
        self._lr = float(self.adapter.optimizer.param_groups[0]["lr"])  # before the schedule moves on

    def _note(self, lr: float) -> None:
        self.step_done()
        if self.looks is not None:
            self.sample = self.looks.finish() or self.sample
        began, self._lr, self._ended = self._ended, None, time.perf_counter()
        step = int(self.adapter.engine.global_steps)  # DeepSpeed counts attempted steps, and saves the count
        loss = None if self.read_loss is None else self.read_loss()
        seen = math.nan if loss is None else loss
        self.last = self.record(step=step, loss=seen, lr=lr, tokens=0, seconds=self._ended - began)
        verdict = self.judge(step, loss)
        if collectives.world()[0] == 0:
            for event in events_of_step(self, self.last, verdict):
                log.log(logging.INFO if event.kind in ORDINARY else logging.WARNING, "step %d: %s: %s", step, event.kind, event.reason)
            if verdict.rewind:  # the loop is somebody else's, and so are its checkpoints
                log.warning("step %d: %s: go back to a checkpoint from before them", step, verdict.rewind)
        if self.rank_times is not None:
            self._compare_ranks(self.rank_times, step, self.last.seconds)

    def _compare_ranks(self, times: RankTimes, step: int, seconds: float) -> None:
        times.end(seconds)  # whatever the loop does between two steps is the rank's own, fetching data too
        window = times.window(step)
        for event in window.events if window is not None and collectives.world()[0] == 0 else ():
            log.warning("step %d: %s: %s", step, event.kind, event.reason)
        times.begin()


def initialize(
    model: nn.Module,
    model_parameters: Iterable[Any] | None = None,
    config: str | Path | dict[str, Any] | None = None,
    optimizer: Any = None,
    lr_scheduler: Any = None,
    training_data: Any = None,
    mpu: Any = None,
    **kwargs: Any,
) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize`` with the JSON checked and completed, and ``megastab.stability`` at work (collective over the job).

    Args:
        model: any module, or a ``PipelineModule``.
        model_parameters: parameters or groups of them; None for all of ``model``'s. Plain parameters get weight decay by role.
        config: the JSON, as a path or a dict; DeepSpeed's keys beside ``{"megastab": {"stability": ...}}``.
        optimizer: instead of the JSON's; without one, AdamW, Adam and SGD are torch's own in their fused form,
            and OrthoAdam is ours.
        lr_scheduler: as for DeepSpeed.
        training_data: as for DeepSpeed.
        mpu: of a tensor-parallel model.
        kwargs: anything else ``deepspeed.initialize`` takes.

    Returns:
        Engine, optimizer, data loader and learning-rate scheduler.

    Raises:
        UserError: the JSON cannot be used; the message says why and what to write.
    """
    loaded = load_library_config(_source(config, kwargs), has_optimizer=optimizer is not None)
    if not collectives.is_initialized() and kwargs.get("dist_init_required") is not False:
        start_job()
    if optimizer is None and loaded.optimizer is not None:
        optimizer, model_parameters = _build_optimizer(loaded.optimizer, model, model_parameters), None
    with collectives.together("checking the optimizer"):
        refuse_strangers(optimizer, model)
    with quiet():
        built = deepspeed.initialize(
            model=model,
            model_parameters=model_parameters,
            config=loaded.deepspeed,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            training_data=training_data,
            mpu=mpu,
            **kwargs,
        )
    _say(loaded)
    _install(built[0], loaded.block)
    return built


def attach(engine: Any, config: str | Path | dict[str, Any] | None = None) -> Controller:
    """Norm, clipping and rescaling for an engine somebody else built (collective over the job); its ``engine.stability``.

    Args:
        engine: what ``deepspeed.initialize`` returned, between two steps.
        config: a JSON with a ``"megastab"`` block; None takes the block of the JSON the engine was built from, if it has one.

    Raises:
        UserError: the block cannot be used, or the engine has a controller already.
        UnsupportedEngine: a wrapper, or a DeepSpeed version, megastab does not drive.
    """
    if hasattr(engine, "stability"):
        raise UserError("this engine has a controller already (engine.stability): attach it once, and not after megastab.initialize")
    in_force, _ = read_source(getattr(engine, "config", None) or {})
    block = load_block(in_force if config is None else config, in_force, must_have=config is not None)
    # Left out, gradient_clipping is 1.0 to DeepSpeed: a cap nobody asked for would leave ZClip nothing to do.
    is_uncapped = block.stability.clipping is not None and in_force.get("gradient_clipping") is None
    return _install(engine, block, is_uncapped)


def _source(config: Any, kwargs: dict[str, Any]) -> Any:
    """The JSON from wherever ``deepspeed.initialize`` takes it; taken out of ``kwargs``, which DeepSpeed would read too."""
    args = kwargs.get("args")
    named = [config, kwargs.pop("config_params", None), getattr(args, "deepspeed_config", None)]
    given = [source for source in named if source is not None]
    if len(given) != 1:
        raise UserError(f"megastab.initialize takes one config (a path or a dict), as config or as args.deepspeed_config; got {len(given)}")
    if named[2] is not None:
        kwargs["args"] = copy.copy(args)
        kwargs["args"].deepspeed_config = None
    return given[0]


def _build_optimizer(kind: tuple[str, dict[str, Any]], model: nn.Module, model_parameters: Any) -> torch.optim.Optimizer:
    name, params = kind
    given = list(model.parameters() if model_parameters is None else model_parameters)
    if given and isinstance(given[0], dict):
        if name == "OrthoAdam":
            return OrthoAdam(given, **params)
        return getattr(torch.optim, name)(given, **params, fused=True)  # the caller has decided what decays
    return build_optimizer(name, params, given)


def _say(loaded: LibraryConfig) -> None:
    if collectives.world()[0] == 0:
        for completion in loaded.completions:
            log.info("set %s = %s: %s", completion.key, completion.value, completion.reason)


def _install(engine: Any, block: LibraryBlock, is_uncapped: bool = False) -> LibraryController:
    """The seams, the controller and its place in checkpoints."""
    stability = block.stability
    grid = grid_of(engine)
    adapter = bind(engine, grid)
    adapter.tp = grid.tp
    rotated = bind_ortho_adam(adapter, grid)
    if rotated and collectives.world()[0] == 0:
        log.info("OrthoAdam: %s", rotated)
    adapter.cap = 0.0 if is_uncapped else adapter.cap
    if grid.pp.size > 1:
        complete_gradients(adapter)
    if stability.tvr is not None:
        _name_unknown(adapter, grid)
    try:
        controller: Any = build_controller(adapter, grid, stability, engine.train_batch_size())
    except ValueError as error:  # a setting that only the trainer can carry out
        raise UserError(f"megastab.stability cannot be used here: {error}") from error
    controller.__class__ = LibraryController  # the same controller, with a record of its own
    controller.watch()
    if block.telemetry is not None:
        controller.looks = WeightLooks(block.telemetry, controller)
        controller.rank_times = rank_times(block.telemetry.straggler, adapter, grid, HOST)
        if controller.rank_times is not None:
            controller.rank_times.begin()
    _keep_in_checkpoints(engine, controller)
    if (said := controller.start_warning()) and collectives.world()[0] == 0:
        log.warning(said)
    engine.stability = controller
    return controller


def _name_unknown(adapter: Adapter, grid: Grid) -> None:
    if grid.stage.rank:
        return  # once a stage
    named = adapter.engine.module.named_parameters()
    if unknown := without_role({name: p for name, p in named if p.requires_grad and info_of(p) is None}):
        log.warning(
            "TVR leaves alone what has no role it knows: %s. Map a matrix with megastab.parallel.foreign.register(pattern, role) before "
            'the engine is built, role one of q, k, v, o, gate, up, down, or "other" to leave it alone without this warning; one that '
            "holds several matrices (q, k and v fused) has no single role.",
            ", ".join(unknown),
        )


def _keep_in_checkpoints(engine: Any, controller: Controller) -> None:
    """Have the engine's own checkpoints carry the controller's state, beside the caller's client_state."""
    save, load = engine.save_checkpoint, engine.load_checkpoint
    signature = inspect.signature(load)

    def save_checkpoint(save_dir: Any, tag: Any = None, client_state: dict[str, Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        client = client_state or {}
        if STATE_KEY in client:
            raise UserError(f'client_state["{STATE_KEY}"] is where the controller keeps its state: use another key')
        return save(save_dir, tag, {**client, STATE_KEY: {"stability": controller.state_dict()}}, *args, **kwargs)

    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        path, client = load(*args, **kwargs)
        state = client.pop(STATE_KEY, None) if client else None
        asked = signature.bind(*args, **kwargs).arguments
        # Weights alone begin a new run: its norms are not the old one's.
        if state is not None and asked.get("load_optimizer_states", True) and not asked.get("load_module_only", False):
            for change in controller.load_state_dict(state["stability"]):
                if collectives.world()[0] == 0:
                    log.warning("resumed with other settings: %s", change)
        return path, client

    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint
