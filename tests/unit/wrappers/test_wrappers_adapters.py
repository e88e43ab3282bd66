"""Every wrapper answers the same verbs with the same facts. One job per wrapper collects them all; each test reads one.

The loss is multiplied by ``FACTOR`` on the ranks, which is how norms of any size, and gradients that are not finite, are made.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from tests import jobs
from tests.layouts import Layout, config_of
from tests.ranks import run_ranks

FACTOR = 1.0
SMALL_SCALE = {"ds__fp16": {"enabled": True, "initial_scale_power": 8}}


@dataclass(frozen=True)
class Wrapped:
    """A run that gets one of DeepSpeed's wrappers."""

    wrapper: str
    layout: Layout
    dtype: str = "fp32"


TP_PP = Layout(4, tp=2, pp=2, sp=True, zero=1, accumulation=2)
WRAPPED = {
    "plain": Wrapped("AdamW", Layout(2, accumulation=2)),
    "plain-tp2-pp2": Wrapped("AdamW", Layout(4, tp=2, pp=2, accumulation=2)),
    "bf16": Wrapped("BF16_Optimizer", Layout(2, zero=1, accumulation=2), "bf16"),
    "bf16-tp2-pp2": Wrapped("BF16_Optimizer", TP_PP, "bf16"),
    "zero1": Wrapped("DeepSpeedZeroOptimizer", Layout(2, zero=1, accumulation=2)),
    "zero1-fp16": Wrapped("DeepSpeedZeroOptimizer", Layout(2, zero=1, accumulation=2), "fp16"),
    "zero1-fp16-tp2-pp2": Wrapped("DeepSpeedZeroOptimizer", TP_PP, "fp16"),
    "zero2": Wrapped("DeepSpeedZeroOptimizer", Layout(2, zero=2, accumulation=2)),
    "zero2-bf16-dp3": Wrapped("DeepSpeedZeroOptimizer", Layout(3, zero=2, accumulation=2), "bf16"),
    "zero2-offload": Wrapped("DeepSpeedZeroOptimizer", Layout(2, zero=2, offload=True), "bf16"),
    "zero2-fp16-offload": Wrapped("DeepSpeedZeroOptimizer", Layout(2, zero=2, offload=True, accumulation=2), "fp16"),
    "zero3": Wrapped("DeepSpeedZeroOptimizer_Stage3", Layout(2, zero=3, accumulation=2)),
    "zero3-bf16-tp2": Wrapped("DeepSpeedZeroOptimizer_Stage3", Layout(4, tp=2, sp=True, zero=3), "bf16"),
    "zero3-fp16": Wrapped("DeepSpeedZeroOptimizer_Stage3", Layout(3, zero=3), "fp16"),
    "zero3-offload": Wrapped("DeepSpeedZeroOptimizer_Stage3", Layout(2, zero=3, offload=True), "bf16"),
}
each_wrapper = pytest.mark.parametrize("name", WRAPPED)


# -- on the ranks --------------------------------------------------------------------------------------------------------


def scale_losses() -> None:
    """Have every loss multiplied by FACTOR, on either engine."""
    from megastab.model import loss, stages, transformer

    def scaled(*args: Any) -> torch.Tensor:
        return loss.cross_entropy(*args) * FACTOR

    stages.cross_entropy = transformer.cross_entropy = scaled  # type: ignore[assignment]


def set_factor(value: float) -> None:
    global FACTOR
    FACTOR = value


def fresh(wrapped: Wrapped, optimizer: str = "AdamW", **changes: Any) -> jobs.Job:
    set_factor(1.0)
    scale = SMALL_SCALE if wrapped.dtype == "fp16" else {}
    return jobs.start(config_of(wrapped.layout, optimizer, wrapped.dtype, **{**scale, "model__num_kv_heads": 2, **changes}))


def weights(job: jobs.Job) -> list[jobs.Piece]:
    """What the forward pass reads: whole rank-local parameters, gathered where they are partitioned."""
    from megastab.wrappers.adapter import split_parts
    from megastab.wrappers.zero3 import gathered

    out = []
    for parameter in job.built.adapter.parameters():
        with gathered(parameter):
            flat = parameter.data.reshape(-1)
            out += [jobs.piece(f, f.low) for f in split_parts(parameter, job.built.adapter.info(parameter), 0, flat, flat)]
    return out


def counted(job: jobs.Job) -> list[jobs.Piece]:
    """The masters this rank contributes to a sum."""
    from megastab.parallel.ownership import counts_here
    from megastab.wrappers.plain import PlainAdapter

    adapter, grid = job.built.adapter, job.grid
    is_first = not isinstance(adapter, PlainAdapter) or grid.dp.rank == 0
    mine = [f for f in adapter.fragments() if is_first and counts_here(f.parameter, grid.tp.rank)]
    return [jobs.piece(f, f.master) for f in mine]


def low_is_rounded_master(job: jobs.Job) -> bool:
    return all(torch.equal(f.low.cpu(), f.master.to(f.low.dtype).cpu()) for f in job.built.adapter.fragments())


def moments(job: jobs.Job) -> list[np.ndarray]:
    wrapper = job.built.engine.optimizer
    state = getattr(wrapper, "optimizer", wrapper).state
    return [v.detach().float().numpy().copy() for values in state.values() for v in values.values() if torch.is_tensor(v)]


def snapshot(job: jobs.Job) -> dict[str, Any]:
    """Everything a skipped step must leave alone."""
    engine = job.built.engine
    return {
        "masters": [p[3] for p in jobs.masters(job)],
        "weights": [p[3] for p in weights(job)],
        "moments": moments(job),
        "schedule": engine.lr_scheduler.state_dict()["last_epoch"],
        "lr": [group["lr"] for group in engine.optimizer.param_groups],
        "loss_scale": float(getattr(engine.optimizer, "loss_scale", 1.0)),
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, list):
            return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
        return np.array_equal(a, b)

    return [key for key in before if not same(before[key], after[key])]


def ordinary_steps(wrapped: Wrapped) -> dict[str, Any]:
    job = fresh(wrapped)
    heard: list[float] = []
    job.built.adapter.on_norm(heard.append)
    for _ in range(3):
        job.step()
    facts = {"wrapper": type(job.built.engine.optimizer).__name__, "heard": len(heard), "counted": counted(job)}
    facts |= {
        "masters": jobs.masters(job),
        "weights": weights(job),
        "low": low_is_rounded_master(job),
        "skipped": job.built.engine.skipped_steps,
    }
    job.built.engine.destroy()
    return facts


def scaled_gradients(wrapped: Wrapped) -> list[tuple[float, float]]:
    """(norm, largest deviation of the gradient from 0.2 times the unscaled one, relative to it) over many sizes of norm."""
    job = fresh(wrapped, "SGD", ds__optimizer={"params": {"lr": 0.0, "momentum": 0.0}})  # lr 0: the same gradient each time
    scale = [1.0]
    job.built.adapter.on_norm(lambda norm: job.built.adapter.set_scale(scale[0]))
    tap, out = jobs.GradientTap(job), []
    for exponent in (0,) if wrapped.dtype == "fp16" else (-8, -6, -3, 0, 4):  # fp16's own range is too short for the others
        set_factor(10.0**exponent)
        found = []
        for scale[0] in (1.0, 0.2):
            job.batches.consumed = 0
            job.step()
            found.append([values for _, _, _, values in tap.pieces()])
        whole = max((np.abs(a).max() for a in found[0]), default=0.0)
        worst = max((np.abs(b - 0.2 * a).max() for a, b in zip(*found, strict=True)), default=0.0)
        out.append((job.norm, float(worst / (0.2 * whole)) if whole else 0.0))
    job.built.engine.destroy()
    return out


def skipped_steps(wrapped: Wrapped) -> dict[str, Any]:
    job = fresh(wrapped)
    skipping = False
    job.built.adapter.on_norm(lambda norm: job.built.adapter.skip() if skipping else None)
    edits: list[int] = []
    job.built.adapter.after_update(lambda: bool(edits.append(1)))
    job.step()
    job.step()
    skipping, before = True, snapshot(job)
    job.step()
    job.step()
    after, counted_steps = snapshot(job), job.built.engine.skipped_steps
    skipping = False
    job.step()
    facts = {"changed": changed(before, after), "skipped": counted_steps, "edits": len(edits), "then": changed(after, snapshot(job))}
    job.built.engine.destroy()
    return facts


def ramp(name_size_first: tuple[int, int]) -> torch.Tensor:
    """Values that tell their place in the whole matrix, exact in every precision."""
    length, first = name_size_first
    return (torch.arange(first, first + length) % 61).float() / 64 + 1 / 64


def edited_masters(wrapped: Wrapped) -> dict[str, Any]:
    job = fresh(wrapped)
    adapter = job.built.adapter

    def edit() -> bool:
        for f in adapter.fragments():
            f.master.copy_(ramp((f.master.numel(), f.part.start * (f.info.width or 1) + f.start)))
        return True

    job.step()
    edits = [edit]
    adapter.after_update(lambda: edits[0]() if edits else False)
    job.step()
    edits.clear()
    facts = {"masters": jobs.masters(job), "weights": weights(job), "low": low_is_rounded_master(job)}
    facts["finite"] = math.isfinite(job.step())
    job.built.engine.destroy()
    return facts


def bad_gradients(wrapped: Wrapped) -> dict[str, Any]:
    """One data-parallel rank (or all, without data parallelism) makes a NaN; then training goes on."""
    job = fresh(wrapped)
    heard: list[float] = []
    job.built.adapter.on_norm(heard.append)
    job.step()
    before, out = snapshot(job), {}
    for value in (math.nan, math.inf):
        if job.grid.dp.rank == job.grid.dp.size - 1:
            set_factor(value)
        job.step()
        out[str(value)] = (job.norm, job.decision.action, changed(before, snapshot(job)))
        set_factor(1.0)
    facts = {"steps": out, "skipped": job.built.engine.skipped_steps, "heard": len(heard)}
    facts["finite"] = math.isfinite(job.step())
    facts["then"] = (job.decision.action, changed(before, snapshot(job)))
    job.built.engine.destroy()
    return facts


def grown_scale(wrapped: Wrapped) -> dict[str, Any] | None:
    """fp16: the norm of each step where the loss scale grows every second step, and where it never does."""
    if wrapped.dtype != "fp16":
        return None
    norms, scales, gradients = [], [], []
    for window in (1000, 2):
        set_factor(1.0)
        fp16 = {"enabled": True, "initial_scale_power": 6, "loss_scale_window": window}
        job = jobs.start(
            config_of(wrapped.layout, "SGD", wrapped.dtype, ds__fp16=fp16, ds__optimizer={"params": {"lr": 0.0, "momentum": 0.0}})
        )
        tap = jobs.GradientTap(job)
        norms.append([])
        for _ in range(4):
            job.batches.consumed = 0
            job.step()
            norms[-1].append(job.norm)
            gradients.append(sum(float(np.square(p[3].astype(np.float64)).sum()) for p in tap.pieces()))
        scales.append(float(job.built.engine.optimizer.loss_scale))
        job.built.engine.destroy()
    return {"norms": norms, "scales": scales, "gradients": gradients}


def collect(wrapped: Wrapped) -> dict[str, Any]:
    scale_losses()
    parts = (ordinary_steps, scaled_gradients, skipped_steps, edited_masters, bad_gradients, grown_scale)
    return {part.__name__: part(wrapped) for part in parts}


# -- the tests -----------------------------------------------------------------------------------------------------------


@functools.cache
def facts(name: str) -> list[dict[str, Any]]:
    return run_ranks(WRAPPED[name].layout.world, collect, WRAPPED[name])


def of(name: str, part: str) -> list[Any]:
    return [rank[part] for rank in facts(name)]


@each_wrapper
def test_run_gets_the_wrapper_it_is_meant_to(name: str) -> None:
    assert {rank["wrapper"] for rank in of(name, "ordinary_steps")} == {WRAPPED[name].wrapper}


@each_wrapper
def test_counted_fragments_hold_every_element_once(name: str) -> None:
    times: dict[str, np.ndarray] = {}
    for rank in of(name, "ordinary_steps"):
        for matrix, size, first, values in rank["counted"]:
            times.setdefault(matrix, np.zeros(size, int))[first : first + len(values)] += 1
    assert len(times) == 2 * 9 + 3, "q, k, v, o, gate, up, down and two norms a block; embedding, head, final norm"
    assert all((count == 1).all() for count in times.values())


@each_wrapper
def test_weights_are_rounded_masters(name: str) -> None:
    ranks = of(name, "ordinary_steps")
    assert all(rank["low"] for rank in ranks)
    check_published(name, ranks)


def check_published(name: str, ranks: list[Any]) -> dict[str, np.ndarray]:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[WRAPPED[name].dtype]
    masters, drift = jobs.merge(rank["masters"] for rank in ranks)
    published, low_drift = jobs.merge(rank["weights"] for rank in ranks)
    assert drift == 0.0 and low_drift == 0.0
    for matrix, values in masters.items():
        assert np.array_equal(torch.from_numpy(values).to(dtype).float().numpy(), published[matrix]), matrix
    return masters


@each_wrapper
def test_norm_is_heard_once_a_step(name: str) -> None:
    assert {rank["heard"] for rank in of(name, "ordinary_steps")} == {3}
    assert {rank["skipped"] for rank in of(name, "ordinary_steps")} == {0}


@each_wrapper
def test_scale_is_applied_exactly_at_any_norm(name: str) -> None:
    """3e-7: the factor is formed in fp32 as (g + 1e-6) 0.2 / (g + 1e-6) and multiplied once."""
    for rank in of(name, "scaled_gradients"):
        assert rank[0][0] < 1e-7 and rank[-1][0] > 1e3 if WRAPPED[name].dtype != "fp16" else len(rank) == 1
        assert max(deviation for _, deviation in rank) < 3e-7


@each_wrapper
def test_skipped_step_changes_nothing(name: str) -> None:
    for rank in of(name, "skipped_steps"):
        assert rank["changed"] == [] and rank["skipped"] == 2
        assert {"masters", "weights", "moments", "schedule"} <= set(rank["then"]), "and the next step is an ordinary one"
        assert rank["edits"] == 3, "no edit of masters on a skipped step"


@each_wrapper
def test_edited_masters_are_published_in_the_same_step(name: str) -> None:
    ranks = of(name, "edited_masters")
    assert all(rank["low"] and rank["finite"] for rank in ranks)
    for values in check_published(name, ranks).values():
        assert np.array_equal(values, ramp((len(values), 0)).numpy())


@each_wrapper
def test_gradient_that_is_not_finite_is_skipped_and_told(name: str) -> None:
    for rank in of(name, "bad_gradients"):
        for norm, action, differs in rank["steps"].values():
            assert norm == math.inf and action == "skip"
            assert set(differs) <= ({"loss_scale"} if WRAPPED[name].dtype == "fp16" else set())
        assert rank["skipped"] == 2 and rank["heard"] == 3
        assert rank["finite"] and rank["then"][0] == "apply" and "masters" in rank["then"][1]


@pytest.mark.parametrize("name", [name for name, wrapped in WRAPPED.items() if wrapped.dtype == "fp16"])
def test_growing_loss_scale_leaves_gradients_alone(name: str) -> None:
    """1e-3: fp16 rounds the scaled gradients; a growth step that divides by the new scale would halve them."""
    ranks = of(name, "grown_scale")
    for rank in ranks:
        steady, growing = rank["norms"]
        assert rank["scales"][1] >= 2 * rank["scales"][0], "it grew"
        assert growing == pytest.approx(steady, rel=1e-3)
    sums = np.sum([rank["gradients"] for rank in ranks], axis=0)
    assert sums == pytest.approx(np.full_like(sums, sums[0]), rel=2e-3)
