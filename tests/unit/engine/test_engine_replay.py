"""A bad step is replayed: what is named is what was planted, in every wrapper and layout, and the run goes on as if nothing had been.

One job per number of ranks goes through all its cells; each test reads one cell. Planted are a NaN in the output of layer 0's first MLP
product (one rank, micro-batch 1), an infinite gradient of the output of layer 1's second one (one rank, micro-batch 0), the former in
one step only, and a NaN weight. Layer 0 is on the first pipeline stage and layer 1 on the last, so that forward and backward both carry
the damage to the other stage.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pytest
import torch

from megastab.engine.replay import ReplayFinding
from megastab.stability.record import Event
from tests import jobs
from tests.layouts import Layout, config_of
from tests.ranks import run_ranks

STEPS = 4
# A pipeline makes its buffers in its first step, whichever that is: they stay, as do flags every step sets before it reads them.
FIRST_STEP = {"first_output_send", "first_gradient_send", "num_pipe_buffers", "pipe_recv_buf", "grad_layer", "_compute_loss"}
FIRST_STEP |= {"_is_gradient_accumulation_boundary"}
DYNAMIC = {"ds__fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2}}
STATIC = {"ds__fp16": {"enabled": True, "loss_scale": 256}}


@dataclass(frozen=True)
class Cell:
    layout: Layout
    dtype: str = "fp32"
    changes: dict[str, Any] = field(default_factory=dict)


CELLS = {
    "single": Cell(Layout(1, accumulation=2), changes={"ds__timers": {"throughput": {"enabled": True}}}),
    "single-recompute": Cell(Layout(1, accumulation=2, recompute="full")),
    "single-tied-gpt-dropout": Cell(Layout(1, accumulation=2), changes={"model": {"arch": "gpt", "tie_embeddings": True, "dropout": 0.1}}),
    "tp2": Cell(Layout(2, tp=2, accumulation=2)),
    "pp2": Cell(Layout(2, pp=2, accumulation=3)),
    "zero1": Cell(Layout(2, zero=1, accumulation=2)),
    "zero2": Cell(Layout(2, zero=2, accumulation=2)),
    "zero3": Cell(Layout(2, zero=3, accumulation=2)),
    "bf16": Cell(Layout(2, zero=1, accumulation=2), "bf16"),
    "zero2-bf16-offload": Cell(Layout(2, zero=2, accumulation=2, offload=True), "bf16"),
    "zero3-bf16": Cell(Layout(2, zero=3, accumulation=2), "bf16", {"ds__zero_optimization": {"stage3_param_persistence_threshold": 0}}),
    "zero1-fp16-static": Cell(Layout(2, zero=1, accumulation=2), "fp16", STATIC),
    "zero2-fp16-dynamic": Cell(Layout(2, zero=2, accumulation=2), "fp16", DYNAMIC),
    "pp2-tied-bf16": Cell(Layout(2, pp=2, zero=1, accumulation=2, recompute="selective"), "bf16", {"model": {"tie_embeddings": True}}),
    "tp2-pp2-sp": Cell(Layout(4, tp=2, pp=2, sp=True, accumulation=2)),
    "tp2-pp2-sp-bf16": Cell(Layout(4, tp=2, pp=2, sp=True, zero=1, accumulation=2), "bf16"),
    "tp2-zero3-sp": Cell(Layout(4, tp=2, sp=True, zero=3, accumulation=2)),
    "cp2": Cell(Layout(2, cp=2, zero=1, accumulation=2)),
    "cp2-pp2-bf16": Cell(Layout(4, cp=2, pp=2, zero=1, accumulation=2), "bf16"),
    "tp2-cp2-zero3-sp-bf16": Cell(Layout(4, tp=2, cp=2, sp=True, zero=3, accumulation=2), "bf16"),
}
each_cell = pytest.mark.parametrize("name", CELLS)
UP, DOWN = "layers.0.mlp.up", "layers.1.mlp.down"


# -- on the ranks --------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What one rank saw in one cell."""

    plain: dict[str, Any] = field(default_factory=dict)
    """A run without a replay."""
    replayed: dict[str, Any] = field(default_factory=dict)
    """The same run with a replay before each step."""
    around: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    """The engine just before and just after each of those replays."""
    findings: dict[str, ReplayFinding] = field(default_factory=dict)
    planted: dict[str, tuple[int, int, tuple[int, ...]] | None] = field(default_factory=dict)
    """(rank, stage, samples) where something was planted on this rank."""
    bad_norm: float = 0.0
    """Of the real step whose cause was there once."""


def replay(job: jobs.Job, batches: Any) -> ReplayFinding:
    from megastab.engine.replay import replay

    return replay(job.built.engine, job.stepper, job.built.controller, batches)


def fresh(cell: Cell) -> jobs.Job:
    """An engine whose monitor is on and notes what it is told."""
    job = jobs.start(config_of(cell.layout, dtype=cell.dtype, **cell.changes))
    monitor = job.built.engine.monitor
    monitor.told = []
    monitor.enabled, monitor.write_events = True, monitor.told.extend
    torch.manual_seed(0)
    return job


def owner_of(job: jobs.Job, part: str) -> torch.nn.Module | None:
    """The module that holds a matrix; None if another stage does."""
    from megastab.parallel.param_info import info_of

    for module in job.built.engine.module.modules():
        for parameter in module.parameters(recurse=False):
            if any(p.name == part for p in info_of(parameter).parts):
                return module
    return None


def is_last_replica(job: jobs.Job) -> bool:
    return job.grid.tp.rank == job.grid.tp.size - 1 and job.grid.dp.rank == job.grid.dp.size - 1


@contextmanager
def planted(job: jobs.Job, part: str, micro_batch: int, spoil: Callable[[torch.Tensor], torch.Tensor], steps: int = 99) -> Iterator[bool]:
    """``spoil`` the output of the module that holds ``part``, in one micro-batch on one rank; whether this rank is the one."""
    root, module, forwards = job.built.engine.module, owner_of(job, part), [0]
    if module is None or not is_last_replica(job):
        yield False
        return

    def count(*_: Any) -> None:
        forwards[0] += 1

    def hook(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor | None:
        step, place = divmod(forwards[0] - 1, job.config.accumulation)
        torch.rand(1)  # a step may draw
        return spoil(output) if place == micro_batch and step < steps else None

    handles = [root.register_forward_pre_hook(count), module.register_forward_hook(hook)]
    try:
        yield True
    finally:
        for handle in handles:
            handle.remove()


def with_nan(output: torch.Tensor) -> torch.Tensor:
    spoilt = output.clone()
    spoilt.view(-1)[3] = math.nan
    return spoilt


def with_infinite_gradient(output: torch.Tensor) -> torch.Tensor:
    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        spoilt = gradient.clone()
        spoilt.view(-1)[3] = math.inf
        return spoilt

    output.register_hook(spoil)
    return output


def where(job: jobs.Job, batches: Any, is_here: bool, micro_batch: int | None) -> tuple[int, int, tuple[int, ...]] | None:
    from megastab.parallel import collectives

    if not is_here:
        return None
    samples = () if micro_batch is None else tuple(batches[micro_batch].sample_ids.tolist())
    return collectives.world()[0], job.grid.pp.rank, samples


def plain_values(thing: Any, without: tuple[str, ...] = ()) -> dict[str, Any]:
    kinds = (int, float, bool, str, type(None))
    return {k: v for k, v in vars(thing).items() if isinstance(v, kinds) and "time" not in k and k not in without}


def hooks_of(module: torch.nn.Module) -> int:
    """Hooks on a module and everything below it."""
    on_modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
    return on_modules + sum(len(p._backward_hooks or ()) for p in module.parameters())


def state_of(job: jobs.Job) -> dict[str, Any]:
    """Everything a step moves that is a plain value, and what it told."""
    engine, optimizer = job.built.engine, job.built.engine.optimizer
    scaler = getattr(optimizer, "loss_scaler", None)
    client = getattr(optimizer, "optimizer", optimizer)
    return {
        "engine": plain_values(engine),
        "optimizer": plain_values(optimizer),
        "norm": float(optimizer._global_grad_norm),
        "scaler": plain_values(scaler) if scaler is not None else {},
        "schedule": engine.lr_scheduler.state_dict()["last_epoch"],
        "moments": [sorted((k, float(torch.as_tensor(v).double().sum())) for k, v in s.items()) for s in client.state.values()],
        "throughput": plain_values(engine.tput_timer),
        "timers": {name: len(timer.event_timers) for name, timer in engine.timers.get_timers().items()},
        "last": [float(getattr(engine, name)) for name in ("total_loss", "agg_train_loss") if getattr(engine, name, None) is not None],
        "events": str(getattr(engine, "summary_events", None)),
        "engine's norm": float(engine._global_grad_norm or 0.0),
        "told": [(name, float(value), step) for name, value, step in engine.monitor.told],
        "random": torch.get_rng_state().tolist(),
        "hooks": hooks_of(engine.module),
        "settings": (engine.steps_per_print(), engine.monitor.enabled, engine.module.training),
    }


def train(job: jobs.Job, before_step: Callable[[int, Any], None]) -> dict[str, Any]:
    out: dict[str, Any] = {"losses": [], "norms": [], "states": []}
    for step in range(STEPS):
        batches = job.batches.next_step()
        before_step(step, batches)
        out["losses"].append(job.stepper.train(batches))
        out["norms"].append(job.norm)
        out["states"].append(state_of(job))
    out["masters"] = [(name, first, values.tolist()) for name, _, first, values in jobs.masters(job)]
    return out


def see(cell: Cell) -> Seen:
    seen = Seen()
    job = fresh(cell)
    seen.plain = train(job, lambda step, batches: None)
    job.built.engine.destroy()

    job = fresh(cell)

    def rehearse(step: int, batches: Any) -> None:
        before = state_of(job)
        plant_and_replay(step, batches)
        after = state_of(job)
        for state in (before, after):
            for owner in ("engine", "optimizer"):
                state[owner] = {k: v for k, v in state[owner].items() if k not in FIRST_STEP}
        seen.around.append((before, after))

    def plant_and_replay(step: int, batches: Any) -> None:
        if step == 1:
            with planted(job, UP, 1, with_nan) as is_here:
                seen.findings["output"] = replay(job, batches)
            seen.planted["output"] = where(job, batches, is_here, 1)
        elif step == 2:
            with planted(job, DOWN, 0, with_infinite_gradient) as is_here:
                seen.findings["backward"] = replay(job, batches)
            seen.planted["backward"] = where(job, batches, is_here, 0)
        else:
            seen.findings[f"clean {step}"] = replay(job, batches)

    seen.replayed = train(job, rehearse)
    batches = job.batches.next_step()
    with planted(job, UP, 1, with_nan, steps=1):
        job.stepper.train(batches)
        seen.bad_norm = job.norm
        seen.findings["once"] = replay(job, batches)
    spoil_weight(job, batches, seen)
    job.built.engine.destroy()
    return seen


def spoil_weight(job: jobs.Job, batches: Any, seen: Seen) -> None:
    """A NaN in the first entry of layer 1's second product, on the rank that owns it and only in what forward reads."""
    is_here = False
    for fragment in job.built.adapter.fragments():
        if fragment.part.name == DOWN and fragment.start == 0 and job.grid.tp.rank == job.grid.tp.size - 1:
            whole = fragment.parameter.data.view(-1)  # empty where ZeRO-3 gathers it for every use
            (whole if whole.numel() else fragment.low)[0], is_here = math.nan, True
    seen.findings["weight"] = replay(job, batches)
    seen.planted["weight"] = where(job, batches, is_here, None)


def see_all(world: int) -> dict[str, Seen]:
    return {name: see(cell) for name, cell in CELLS.items() if cell.layout.world == world}


@functools.cache
def job_of(world: int) -> list[dict[str, Seen]]:
    return run_ranks(world, see_all, world)


def ranks_of(name: str) -> list[Seen]:
    return [rank[name] for rank in job_of(CELLS[name].layout.world)]


def agreed(name: str, what: str) -> tuple[ReplayFinding, tuple[int, int, tuple[int, ...]]]:
    """The finding, the same on every rank, and where the thing had been planted."""
    ranks = ranks_of(name)
    findings = [rank.findings[what] for rank in ranks]
    assert all(finding == findings[0] for finding in findings), "ranks disagree"
    places = [place for rank in ranks if (place := rank.planted.get(what)) is not None]
    assert len(places) == 1, "it must be planted on one rank"
    return findings[0], places[0]


# -- what is named -------------------------------------------------------------------------------------------------------


@each_cell
def test_output_of_one_micro_batch_is_named(name: str) -> None:
    found, (rank, stage, samples) = agreed(name, "output")
    assert found.repeats and found.norm == math.inf
    assert (found.what, found.name, found.module) == ("output", UP, "ColumnParallelLinear")
    assert (found.rank, found.stage, found.micro_batch, found.samples, found.ranks_hit) == (rank, stage, 1, samples, (rank,))
    assert (found.num_nonfinite, found.num_nan) == (1, 1)


@each_cell
def test_gradient_that_only_backward_spoils_is_named(name: str) -> None:
    found, (rank, stage, samples) = agreed(name, "backward")
    assert found.repeats and found.norm == math.inf
    assert (found.what, found.name, found.module) == ("gradient of output", DOWN, "RowParallelLinear")
    assert (found.rank, found.stage, found.micro_batch, found.samples, found.ranks_hit) == (rank, stage, 0, samples, (rank,))
    assert (found.num_nonfinite, found.num_nan) == (1, 0)


@each_cell
def test_nan_weight_is_named_before_what_it_spoils(name: str) -> None:
    found, (rank, stage, _) = agreed(name, "weight")
    assert found.repeats and found.norm == math.inf
    assert (found.what, found.name, found.module) == ("weight", DOWN, "RowParallelLinear")
    assert (found.rank, found.stage, found.micro_batch, found.num_nonfinite, found.num_nan) == (rank, stage, None, 1, 1)


@each_cell
def test_what_happened_once_does_not_repeat(name: str) -> None:
    ranks = ranks_of(name)
    assert all(rank.bad_norm == math.inf for rank in ranks), "the real step must have been bad"
    for rank in ranks:
        found = rank.findings["once"]
        assert not found.repeats and found.what == "none" and 0 < found.norm < math.inf
        assert found == ranks[0].findings["once"] and found.rank is None


@each_cell
def test_replay_forms_the_norm_of_the_step_it_repeats(name: str) -> None:
    """Also before the first update, when the wrappers have no moments yet."""
    for rank in ranks_of(name):
        for step in (0, 3):
            assert rank.findings[f"clean {step}"] == ReplayFinding(False, rank.plain["norms"][step])


# -- no trace ------------------------------------------------------------------------------------------------------------


@each_cell
def test_replay_leaves_no_trace(name: str) -> None:
    """Four steps with a replay before each, good and bad ones, are four steps without: every bit of it."""
    for rank in ranks_of(name):
        for what in ("losses", "norms", "masters"):
            assert rank.replayed[what] == rank.plain[what], what
        for step, (with_replay, without) in enumerate(zip(rank.replayed["states"], rank.plain["states"], strict=True)):
            for what in without:
                assert with_replay[what] == without[what], (step, what)
        for step, (before, after) in enumerate(rank.around):
            for what in before:
                assert after[what] == before[what], (step, what)


def test_loss_scale_moved_in_the_runs_compared() -> None:
    """Else the comparison says nothing about its counters."""
    states = ranks_of("zero2-fp16-dynamic")[0].plain["states"]
    assert len({state["scaler"]["cur_scale"] for state in states}) > 1
    assert len(states[-1]["moments"]) > 0 and len({str(state["moments"]) for state in states}) == STEPS


# -- on one rank, on both engines ----------------------------------------------------------------------------------------


def see_seldom() -> dict[str, Any]:
    """Causes outside the modules, and an error in the replay."""
    out: dict[str, Any] = {}
    job = fresh(CELLS["single"])
    module, batches = job.built.engine.module, job.batches.next_step()
    mlp = module.blocks[1].mlp
    mlp.activate = lambda hidden: type(mlp).activate(mlp, hidden) * math.inf
    out["input"] = replay(job, batches)
    del mlp.activate

    out["weights of the loss"] = replay(job, [batches[0], replace(batches[1], weights=batches[1].weights * math.inf)])

    handle = module.head.weight.register_hook(lambda gradient: gradient * 1e25)  # finite, but not its square
    out["sum"] = replay(job, batches)
    handle.remove()

    handle = mlp.up.weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([gradient.shape[0] - 1]), math.nan))
    out["gradient"] = replay(job, batches)
    handle.remove()

    before = state_of(job)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = mlp.down.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        replay(job, batches)
    handle.remove()
    out["error"] = (before, state_of(job))
    out["decided"] = job.decision
    out["compiled"] = replay_compiled(job, batches)
    return out


def replay_compiled(job: jobs.Job, batches: Any) -> tuple[ReplayFinding, bool]:
    """The bad step runs compiled; and whether the compiled code is in use again afterwards."""
    job.built.engine.zero_grad()
    calls = [0]

    def backend(graph: Any, _: Any) -> Any:
        def run(*args: Any) -> Any:
            calls[0] += 1
            return graph(*args)

        return run

    for block in job.built.engine.module.blocks:
        block.compile(backend=backend)
    up = job.built.engine.module.blocks[1].mlp.up
    up.forward = lambda x: type(up).forward(up, x) * math.nan  # compiled code passes over inner hooks
    job.stepper.train(batches)
    assert job.norm == math.inf and calls[0] > 0
    calls[0] = 0
    found = replay(job, batches)
    assert calls[0] == 0, "compiled code ran in the replay"
    del up.forward
    job.stepper.train(batches)
    return found, calls[0] > 0


def see_pipeline_loss() -> ReplayFinding:
    job = fresh(CELLS["pp2"])
    module, loss = job.built.engine.module, job.built.engine.module.loss_fn
    module.loss_fn = lambda *args: loss(*args) * math.inf
    found = replay(job, job.batches.next_step())
    assert module.loss_fn is not loss and module.loss_fn.__name__ == "<lambda>", "the loss must be put back"
    return found


@functools.cache
def seldom() -> dict[str, Any]:
    return run_ranks(1, see_seldom)[0]


def test_code_between_modules_is_named_by_the_input_it_makes() -> None:
    found = seldom()["input"]
    assert (found.what, found.name, found.module, found.micro_batch) == ("input", "layers.1.mlp.down", "RowParallelLinear", 0)


def test_bad_loss_weights_are_named_as_the_models_input() -> None:
    found = seldom()["weights of the loss"]
    assert (found.what, found.name, found.module, found.micro_batch) == ("input", "model", "Transformer", 1)


def test_bad_loss_of_a_pipeline_is_named() -> None:
    for found in run_ranks(2, see_pipeline_loss):
        assert (found.what, found.name, found.rank, found.stage, found.micro_batch) == ("output", "loss", 1, 1, 0)


def test_overflow_of_the_sum_alone_is_said() -> None:
    found = seldom()["sum"]
    assert found == ReplayFinding(True, math.inf) and "sum of squares" in found.describe()


def test_gradient_is_named_by_the_matrix_of_a_fused_one() -> None:
    found = seldom()["gradient"]
    assert (found.what, found.name, found.num_nonfinite, found.micro_batch) == ("gradient", "layers.1.mlp.up", 32, 0)


def test_an_error_leaves_no_hook_and_no_count() -> None:
    before, after = seldom()["error"]
    assert before == after
    assert seldom()["decided"] is None, "a replay must not decide"


def test_compiled_blocks_run_eagerly_so_that_inner_hooks_fire() -> None:
    found, is_compiled_again = seldom()["compiled"]
    assert found.repeats and (found.what, found.name) == ("output", "layers.1.mlp.up")
    assert is_compiled_again


# -- what is said --------------------------------------------------------------------------------------------------------

FOUND = ReplayFinding(
    True, math.inf, "output", "layers.7.mlp.up", "ColumnParallelLinear", 3, 1, 2, 5, 4, 4096, ranks_hit=(3, 7), samples=(96, 97)
)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("weight", "weight layers.7.mlp.up"),
        ("master weight", "the fp32 master of layers.7.mlp.up"),
        ("input", "the input of layers.7.mlp.up"),
        ("output", "the output of layers.7.mlp.up"),
        ("gradient of output", "the gradient of the output of layers.7.mlp.up"),
        ("gradient", "the gradient of layers.7.mlp.up"),
    ],
)
def test_one_line_says_what_where_and_what_to_do(what: Any, said: str) -> None:
    line = replace(FOUND, what=what).describe()
    assert line.startswith("repeats: ") and "\n" not in line and said + " (" in line
    assert "rank 3 (with ranks 7), stage 1, micro-batch 2" in line and "5 of 4096 entries not finite (4 nan)" in line
    assert ("samples 96, 97" in line) != ("checkpoint" in line), "a weight is replaced, a sample is looked at"


def test_what_did_not_repeat_points_at_the_machine() -> None:
    assert (
        "did not repeat (norm 1.5 " in ReplayFinding(False, 1.5).describe() and "suspect a machine" in ReplayFinding(False, 1.5).describe()
    )
    assert "suspect the machine of rank 3" in replace(FOUND, repeats=False, norm=1.5).describe()


def test_facts_are_plain_and_keep_the_steps_own_norm() -> None:
    line = json.loads(json.dumps(Event(12, "replay", FOUND.describe(), {"norm": 3.0, **FOUND.facts()}).to_json()))
    assert line["norm"] == 3.0 and line["replay_norm"] is None and line["ranks_hit"] == [3, 7] and line["samples"] == [96, 97]
    assert set(asdict(FOUND)) - {"norm"} <= set(line)
