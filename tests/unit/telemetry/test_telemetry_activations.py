"""What telemetry sees of the activations is the same at every layout, is its definition, and costs nothing on a step it does not sample.

Tolerances: a layout adds the same products in another order, a few fp32 roundings (6e-8) per sum over two layers, so values and RMS agree
to 1e-5 and are never closer to each other than that where their order decides; kurtosis is a ratio of fourth powers of them, measured
2e-6, 1e-5 allowed. The median may fall into the neighbouring bin: twice its stated error apart.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megastab.config.schema_telemetry import TelemetryConfig
from megastab.telemetry.activations import SITES, ActivationWatch
from megastab.telemetry.moments import MEDIAN_ERROR
from megastab.telemetry.sampler import Sample, Sampler
from tests import jobs
from tests.layouts import GPT, SEQ, Layout, SyntheticSource, config_of
from tests.ranks import run_ranks

EVERY_OTHER = TelemetryConfig(interval_steps=2, weights=False, attention=False)
KINDS = ("activations", "attention", "weights")
PLANTED, CHANNEL, HEIGHT = 62, 7, 5000.0  # a token of some samples, whose embedding carries one huge channel


@dataclass(frozen=True)
class Cell:
    layout: Layout
    dtype: str = "fp32"
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def single(self) -> Layout:
        """One process that sees the same tokens first."""
        return Layout(1, accumulation=self.layout.accumulation)


CELLS = {
    "recompute-full": Cell(Layout(1, accumulation=2, recompute="full")),
    "recompute-selective": Cell(Layout(1, accumulation=2, recompute="selective")),
    "tp2": Cell(Layout(2, tp=2)),
    "tp2-sp": Cell(Layout(2, tp=2, sp=True)),
    "tp2-sp-full": Cell(Layout(2, tp=2, sp=True, accumulation=2, recompute="full")),
    "pp2": Cell(Layout(2, pp=2, accumulation=3)),
    "pp2-full": Cell(Layout(2, pp=2, accumulation=3, recompute="full")),
    "dp2": Cell(Layout(2)),
    "dp2-accumulated": Cell(Layout(2, accumulation=3)),
    "zero3": Cell(Layout(2, zero=3), changes={"ds__zero_optimization": {"stage3_param_persistence_threshold": 0}}),
    "zero3-full": Cell(Layout(2, zero=3, accumulation=2, recompute="full")),
    "zero1-pp2": Cell(Layout(2, pp=2, zero=1, accumulation=2, recompute="selective")),
    "peri-gpt": Cell(Layout(2, tp=2, sp=True), changes={"model": {**GPT, "norm_position": "peri"}}),
    "tp2-pp2-sp": Cell(Layout(4, tp=2, pp=2, sp=True, accumulation=2)),
    "tp2-zero3-sp": Cell(Layout(4, tp=2, sp=True, zero=3, accumulation=2)),
    "tp2-dp2": Cell(Layout(4, tp=2, zero=1)),
    "cp2": Cell(Layout(2, cp=2)),
    "cp2-gpt-full": Cell(Layout(2, cp=2, accumulation=3, recompute="full"), changes={"model": GPT}),
    "cp2-pp2": Cell(Layout(4, cp=2, pp=2, accumulation=2)),
    "tp2-cp2-sp": Cell(Layout(4, tp=2, cp=2, sp=True, accumulation=2)),
    "cp2-dp2": Cell(Layout(4, cp=2, zero=3, accumulation=2)),
}


# -- on the ranks --------------------------------------------------------------------------------------------------------


def plant(job: jobs.Job) -> None:
    """One huge channel in one token's embedding, whoever holds it."""
    for fragment in job.built.adapter.fragments():
        if fragment.part.name == "embedding":
            width = fragment.info.width
            place = (PLANTED - fragment.part.start) * width + CHANNEL - fragment.start
            if 0 <= place < fragment.master.numel():
                for held in (fragment.master.detach(), fragment.low):
                    held[place] = HEIGHT


def sampler_of(job: jobs.Job, config: TelemetryConfig = EVERY_OTHER) -> Sampler:
    return Sampler(config, job.built.controller, job.config.megastab.model.num_layers)


def sampled(job: jobs.Job, sampler: Sampler, step: int = 1) -> Sample | None:
    batches = job.batches.next_step()
    with sampler.looking(step, batches):
        job.stepper.train(batches)
    return sampler.finish()


@contextmanager
def counted_looks() -> Iterator[Counter[str]]:
    """How often a hook of ours fires."""
    looks, see_one = Counter[str](), ActivationWatch._see

    def counting(*args: Any) -> None:
        looks["looks"] += 1
        see_one(*args)

    ActivationWatch._see = counting  # type: ignore[method-assign]
    try:
        yield looks
    finally:
        ActivationWatch._see = see_one  # type: ignore[method-assign]


def see(cells: list[tuple[Cell, Layout]]) -> list[tuple[Sample, int]]:
    """The first step of each, and how often a hook looked on this rank."""
    found = []
    for cell, layout in cells:
        job = jobs.start(config_of(layout, dtype=cell.dtype, **cell.changes))
        plant(job)
        with counted_looks() as looks:
            sample = sampled(job, sampler_of(job))
        found.append((sample, looks["looks"]))
    return found


@functools.cache
def seen_at(world: int) -> dict[str, list[tuple[Sample, int]]]:
    """By cell, what every rank of a job of ``world`` saw; with world 1 also the single processes the others are held against."""
    cells = {name: (cell, cell.layout) for name, cell in CELLS.items() if cell.layout.world == world}
    if world == 1:
        cells |= {f"{name} single": (cell, cell.single) for name, cell in CELLS.items()}
    by_rank = run_ranks(world, see, list(cells.values()))
    return {name: [rank[i] for rank in by_rank] for i, name in enumerate(cells)}


# -- tests ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CELLS)
def test_every_layout_sees_what_one_process_sees(name: str) -> None:
    ranks = [sample for sample, _ in seen_at(CELLS[name].layout.world)[name]]
    assert all(sample == ranks[0] for sample in ranks), "every rank knows the same"
    ((single, _),) = seen_at(1)[f"{name} single"]
    assert list(ranks[0].activations) == list(single.activations) and len(single.activations) == 2 * len(SITES)
    for place, expected in single.activations.items():
        found = ranks[0].activations[place]
        assert [entry[1:] for entry in found.top] == [entry[1:] for entry in expected.top], "sample, position, channel, token: exactly"
        assert [e.value for e in found.top] == pytest.approx([e.value for e in expected.top], rel=1e-5)
        assert found.median == pytest.approx(expected.median, rel=2 * MEDIAN_ERROR)
        assert (found.rms, found.kurtosis_first, found.kurtosis_rest) == pytest.approx(
            (expected.rms, expected.kurtosis_first, expected.kurtosis_rest), rel=1e-5
        )
        assert found.is_massive is expected.is_massive is (place.site == "residual")


def test_the_planted_entry_is_found() -> None:
    ((single, _),) = seen_at(1)["tp2 single"]
    tokens = np.stack([SyntheticSource()[i].tokens[:SEQ] for i in range(12)])
    samples, positions = np.nonzero(tokens == PLANTED)
    for place, seen in single.activations.items():
        assert all(entry.token == tokens[entry.sample, entry.position] for entry in seen.top)
        if place.site == "residual":
            where = [(entry.sample, entry.position, entry.channel) for entry in seen.top if abs(entry.value) > 100]
            assert 0 < len(samples) <= 3 and sorted(where) == [(s, p, CHANNEL) for s, p in zip(samples, positions, strict=True)]
            assert abs(seen.largest - HEIGHT) < 10  # what the blocks add to it


@pytest.mark.parametrize("name", ["recompute-full", "tp2-sp-full", "pp2-full", "zero3-full"])
def test_recomputation_fires_again_and_counts_once(name: str) -> None:
    # The values are held against a single process without recompute above; here, that there was something to ignore.
    cell = CELLS[name]
    looks = [looks for _, looks in seen_at(cell.layout.world)[name]]
    layers, passes = 2 // cell.layout.pp, cell.layout.accumulation
    # A block fires once a pass and its attention twice; its MLP once, as recomputation stops at the last tensor backward needs.
    assert looks == [layers * passes * 4] * len(looks)


def test_ranks_with_equal_tokens_have_no_hooks() -> None:
    assert [looks > 0 for _, looks in seen_at(2)["tp2"]] == [True, False]
    assert [looks > 0 for _, looks in seen_at(2)["tp2-sp"]] == [True, True]


def direct() -> tuple[Sample, list[np.ndarray]]:
    """A sample, and the residual streams of its first micro-batch as another hook saw them."""
    job = jobs.start(config_of(Layout(1, accumulation=2)))
    kept: list[np.ndarray] = []
    handles = [block.register_forward_hook(lambda _, __, x: kept.append(x.detach().double().numpy())) for block in job.built.engine.blocks]
    sample = sampled(job, sampler_of(job))
    for handle in handles:
        handle.remove()
    return sample, kept[:2]


def test_numbers_are_their_definitions() -> None:
    ((sample, streams),) = run_ranks(1, direct)
    for layer, x_TD in enumerate(streams):
        seen = sample.activations[(layer, "residual")]
        centred = x_TD - x_TD.mean(1, keepdims=True)
        by_token = (centred**4).mean(1) / (centred**2).mean(1) ** 2
        is_first = np.arange(len(x_TD)) % SEQ == 0
        assert seen.kurtosis_first == pytest.approx(by_token[is_first].mean(), rel=1e-6)
        assert seen.kurtosis_rest == pytest.approx(by_token[~is_first].mean(), rel=1e-6)
        assert seen.rms == pytest.approx(np.sqrt((x_TD**2).mean()), rel=1e-6)
        assert seen.median == pytest.approx(np.sort(np.abs(x_TD).ravel())[(x_TD.size - 1) // 2], rel=MEDIAN_ERROR)
        best = [np.unravel_index(i, x_TD.shape) for i in np.argsort(-np.abs(x_TD).ravel())[:3]]
        assert [(e.sample * SEQ + e.position, e.channel) for e in seen.top] == [(t, c) for t, c in best]
        assert [e.value for e in seen.top] == [x_TD[place] for place in best], "fp32 in fp64: exactly"


class Kernels(TorchDispatchMode):
    """Counts every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def counted(config: dict[str, Any], telemetry: TelemetryConfig | None, steps: int) -> list[tuple[dict[str, int], int, int, int]]:
    """Operators and installed hooks of each step, hooks of ours left after it, and attention layers looked at in it and after it."""
    from megastab.model.attention import Attention

    job = jobs.start(config)
    layers = [module for module in job.built.engine.module.modules() if isinstance(module, Attention)]

    def looks() -> int:
        return sum(layer.look is not None for layer in layers)

    sampler = None if telemetry is None else sampler_of(job, telemetry)
    installed: Counter[str] = Counter()
    register = torch.nn.Module.register_forward_hook
    found = []
    for step in range(1, steps + 1):
        batches = job.batches.next_step()
        installed.clear()
        during = 0
        torch.nn.Module.register_forward_hook = lambda *args, **kwargs: installed.update("x") or register(*args, **kwargs)  # type: ignore
        with Kernels() as kernels:
            if sampler is None:
                job.stepper.train(batches)
            else:
                with sampler.looking(step, batches):
                    during = looks()
                    job.stepper.train(batches)
                assert (sampler.finish() is None) is not telemetry.samples(step)
        torch.nn.Module.register_forward_hook = register
        left = sum("watch" in str(h).lower() for m in job.built.engine.module.modules() for h in m._forward_hooks.values())
        found.append((dict(kernels.seen), installed["x"], left + looks(), during))
    return found


@pytest.mark.parametrize(
    "layout",
    [Layout(1), Layout(2, zero=3), Layout(2, pp=2, accumulation=2), Layout(2, tp=2, sp=True)],
    ids=["single", "zero3", "pp2", "sp"],
)
def test_a_step_that_is_not_sampled_is_the_bare_step(layout: Layout) -> None:
    config = config_of(layout)
    bare = run_ranks(layout.world, counted, config, None, 4)
    off = run_ranks(layout.world, counted, config, TelemetryConfig(interval_steps=None), 4)
    watched = run_ranks(layout.world, counted, config, TelemetryConfig(interval_steps=2), 4)
    only_attention = run_ranks(layout.world, counted, config, TelemetryConfig(interval_steps=2, activations=False, weights=False), 4)
    for rank, (plain, dark, ours, theirs) in enumerate(zip(bare, off, watched, only_attention, strict=True)):
        assert dark == plain, "off: no hook and no operator more"
        assert ours[2] == theirs[2] == plain[2] and plain[2][3] == 0, "neither between samples"
        assert all(left == 0 for _, _, left, _ in [*ours, *theirs]), "no hook stays"
        looks = 0 if rank >= layout.tp and layout.pp == 1 else 2 // layout.pp  # other data-parallel ranks do not hold the first sample
        for sampled_step in (0, 1, 3):
            assert ours[sampled_step][1] > 0 and sum(ours[sampled_step][0].values()) > sum(plain[sampled_step][0].values())
            assert ours[sampled_step][3] == theirs[sampled_step][3] == looks and theirs[sampled_step][1] == plain[sampled_step][1]
            counts = [found[sampled_step][0].get("aten.special_entr.default", 0) for found in (plain, theirs)]
            assert counts[0] == 0 and (counts[1] > 0) is (looks > 0), "and only there"


def interrupted() -> int:
    job = jobs.start(config_of(Layout(1)))
    sampler, batches = sampler_of(job), job.batches.next_step()

    def num_hooks() -> int:
        return sum(len(m._forward_hooks) for m in job.built.engine.module.modules())

    before = num_hooks()
    with pytest.raises(RuntimeError, match="boom"), sampler.looking(1, batches):
        assert num_hooks() == before + 6
        raise RuntimeError("boom")
    return num_hooks() - before


def test_an_error_in_the_step_leaves_no_hook() -> None:
    assert run_ranks(1, interrupted) == [0]


def compiled() -> list[int]:
    """Places seen in three sampled steps of a compiled model, after one that compiled it."""
    job = jobs.start(config_of(Layout(1, compile=True)))
    job.step()
    sampler = sampler_of(job, TelemetryConfig(interval_steps=1, weights=False))
    found = [sampled(job, sampler, step) for step in (1, 2)]
    return [len([seen for seen in sample.activations.values() if seen.top]) for sample in found]


def test_compiled_blocks_are_seen() -> None:
    assert run_ranks(1, compiled, timeout=300.0) == [[6, 6]]


@pytest.mark.parametrize(("interval", "steps"), [(None, []), (1, [1, 2, 3, 4, 5]), (2, [1, 2, 4]), (4, [1, 4]), (100, [1])])
def test_which_steps_are_sampled(interval: int | None, steps: list[int]) -> None:
    config = TelemetryConfig(interval_steps=interval)
    assert [step for step in range(1, 6) if config.samples(step)] == steps
    assert not TelemetryConfig(activations=False, attention=False, weights=False).samples(1)
    assert all(TelemetryConfig(**{**dict.fromkeys(KINDS, False), kind: True}).samples(1) for kind in KINDS)
