"""A step that leaves no mark on the engine: what one moves beside weights and moments, put back afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from megastab.wrappers.bind import quiet

ENGINE = (
    *("global_steps", "global_samples", "skipped_steps", "micro_steps", "losses", "summary_events"),
    *("_global_grad_norm", "_step_applied", "_unmanaged_backward_count"),
    # of the pipeline
    *("loss", "total_loss", "total_additional_losses", "agg_train_loss", "agg_additional_losses", "dp_group_loss", "fwd_outputs"),
    *("data_iterator", "training_dataloader"),
)
# A wrapper links the moments of its first update, once: a rehearsal of that step has none to link.
OPTIMIZER = ("_global_grad_norm", "overflow", "_hp_optimizer_states_linked")


def count_samples(engine: Any, of_step: int) -> None:
    """Let ``engine`` count ``of_step`` samples a step. By itself it takes the ranks of a sequence for ranks with samples of their own, and
    its count is what its own scalars are drawn over."""
    engine._config.train_batch_size = of_step  # its check against micro-batch, accumulation and ranks is behind us
    engine.tput_timer.batch_size = of_step


@contextmanager
def untouched(engine: Any) -> Iterator[None]:
    """Whatever steps are taken inside (skipped ones: the caller sees to that), ``engine`` counts and tells as if none had been.

    Counters, the loss scale, timers, the last loss and norm and the random generators come back as they were, also after an error;
    nothing is printed, and nothing is written to the monitor.
    """
    with ExitStack() as later:
        for restore in _restorers(engine):
            later.callback(restore)
        later.enter_context(quiet())
        monitored, engine.monitor.enabled = engine.monitor.enabled, False
        later.callback(setattr, engine.monitor, "enabled", monitored)
        engine.steps_per_print = lambda: None  # hides the method until it is deleted
        later.callback(delattr, engine, "steps_per_print")
        yield


def _restorers(engine: Any) -> Iterator[Callable[[], None]]:
    optimizer = engine.optimizer
    yield _attributes(engine, ENGINE)
    yield _attributes(optimizer, OPTIMIZER)
    yield _attributes(engine.module, ("micro_offset", "curr_layer"))  # of a pipeline: it counts forwards
    for owner, name in ((engine, "tput_timer"), (engine, "batch_timer"), (optimizer, "loss_scaler")):
        counted = getattr(owner, name, None)
        if counted is not None:
            yield _attributes(counted, tuple(vars(counted)))
    yield _timers(engine.timers.get_timers())
    yield _states(getattr(optimizer, "optimizer", optimizer).state)
    yield _generators()


def _attributes(owner: Any, names: tuple[str, ...]) -> Callable[[], None]:
    """Of the instance itself, or properties of its class; an engine passes other names on to its module."""
    held = {n: getattr(owner, n) for n in names if n in vars(owner) or isinstance(getattr(type(owner), n, None), property)}

    def restore() -> None:
        for name in names:
            if name in held:
                setattr(owner, name, held[name])
            elif name in vars(owner):
                delattr(owner, name)

    return restore


def _timers(timers: dict[str, Any]) -> Callable[[], None]:
    held = {name: {**vars(timer), "event_timers": list(timer.event_timers)} for name, timer in timers.items()}

    def restore() -> None:
        for name in list(timers):
            if name in held:
                vars(timers[name]).update(held[name])
            else:
                del timers[name]

    return restore


def _states(states: Any) -> Callable[[], None]:
    """Before a first update there are no moments; looking for some leaves an empty entry behind."""
    held = list(states)

    def restore() -> None:
        kept = {id(key) for key in held}
        for key in [key for key in states if id(key) not in kept]:
            del states[key]

    return restore


def _generators() -> Callable[[], None]:
    host, device = torch.get_rng_state(), get_accelerator().get_rng_state()

    def restore() -> None:
        torch.set_rng_state(host)
        get_accelerator().set_rng_state(device)

    return restore
