"""A slow rank of a real job is named, with what it is slow at; one slow step, or none, names nobody.

Sleeps are several times a step of the tiny model on a machine with many other jobs, and the limit lies well between: the other ranks have
to be as slow by accident for half of the steps of a window to turn a test over.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.launching import curve
from tests.layouts import Layout, config_of
from tests.ranks import run_ranks

SIDE_STREAMS = ("independent_gradient_partition_epilogue", "fetch_sub_module")
STEPS, SLEEP_SECONDS = 5, 0.4


@dataclass(frozen=True)
class Slow:
    """Which rank sleeps, where, and in which steps."""

    rank: int
    where: str = "forward"
    """``forward``: of its first block; ``data``: of its source of samples; ``backward``: of its first block's gradient."""
    steps: range = range(1, 100)
    seconds: float = SLEEP_SECONDS
    everyone: float = 0.0
    """Seconds that every rank's forward sleeps in every step: what the machine adds by accident is small beside them."""
    on_a_stream: bool = False
    """The clock is an accelerator's; see :func:`on_a_stream`."""


class Passed:
    """A timing event of a device that comes to it a while after the host."""

    def __init__(self, enable_timing: bool):
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return time.perf_counter() - self.at > SLEEP_SECONDS / 4

    def elapsed_time(self, later: Passed) -> float:
        assert later.query()
        return 1e3 * (later.at - self.at)


def on_a_stream() -> None:
    """Measure by events, as where calls return at once; here they do not, so an event passes when it is recorded."""
    from types import SimpleNamespace

    from megastab.parallel import waiting

    waiting.get_accelerator = lambda: SimpleNamespace(current_stream=lambda: "the step's", Event=Passed)  # type: ignore[attr-defined,assignment,return-value]
    waiting.clock_of_device = waiting.StreamClock  # type: ignore[assignment]


def plan_sleeps(trainer: Any, slow: Slow | None) -> None:
    from megastab.model.block import Block
    from megastab.parallel import collectives

    if slow is None:
        return

    def sleep(*_: Any) -> None:
        if collectives.world()[0] == slow.rank and trainer.step + 1 in slow.steps:
            time.sleep(slow.seconds)

    block = next(module for module in trainer.engine.module.modules() if isinstance(module, Block))
    block.register_forward_pre_hook(lambda *_: time.sleep(slow.everyone))
    if slow.where == "forward":
        block.register_forward_pre_hook(sleep)
    elif slow.where == "backward":
        block.register_full_backward_hook(sleep)
    else:
        batches = trainer.data.train
        next_step = batches.next_step
        batches.next_step = lambda: (sleep(), next_step())[1]  # type: ignore[func-returns-value]


def train(config: dict[str, Any], slow: Slow | None) -> dict[str, Any]:
    """A run on this rank; what it is told to have, and whether its collectives were counted."""
    from deepspeed.comm import comm

    from megastab.config.load import load_config
    from megastab.data.batches import Batches
    from megastab.data.training import TrainingData
    from megastab.engine.trainer import Trainer
    from megastab.parallel import collectives
    from megastab.parallel.grid import Grid
    from megastab.parallel.waiting import Counted
    from tests.layouts import SyntheticSource

    if slow is not None and slow.on_a_stream:
        on_a_stream()
    gathers: list[int] = []
    gather = collectives.gather_doubles
    collectives.gather_doubles = lambda values: gathers.append(trainer.step) or gather(values)  # type: ignore[func-returns-value]
    loaded = load_config(config)
    grid = Grid.create(loaded.megastab.parallel.tensor, loaded.megastab.parallel.pipeline, context=loaded.megastab.parallel.context)
    sizes = {"micro_batch": loaded.micro_batch, "accumulation": loaded.accumulation, "dp_rank": grid.dp.rank, "dp_size": grid.dp.size}
    sizes |= {"cp_rank": grid.cp.rank, "cp_size": grid.cp.size}
    batches = Batches(SyntheticSource(), document_mask=False, **sizes)
    trainer = Trainer(loaded, grid, TrainingData(batches))
    plan_sleeps(trainer, slow)
    said: list[str] = []
    trainer.folder.say = said.append  # type: ignore[method-assign]
    trainer.announce()
    trainer.resume()
    trainer.train()
    is_counted = isinstance(collectives.dist, Counted) or isinstance(comm.cdb, Counted)
    optimizer = trainer.engine.optimizer
    coordinator = optimizer.parameter_offload.get_param_coordinator() if loaded.zero_stage == 3 else None
    replaced = [name for owner in (optimizer, coordinator) for name in vars(owner or trainer) if name in SIDE_STREAMS]
    return {"replaced": replaced, "is_counted": is_counted, "gathers": gathers, "has_times": trainer.rank_times is not None, "said": said}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(folder: Path, layout: Layout, slow: Slow | None, over: float = 1.0, **changes: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """The ranks' results, the events of stragglers and the windows of a run."""
    fixed = {"telemetry": {"interval_steps": 100, "straggler": {"steps": STEPS, "over": over}}, "run__dir": str(folder)}
    fixed |= {"run__total_steps": 2 * STEPS, "run__eval_interval": 100, "run__save_interval": 100}
    ranks = run_ranks(layout.world, train, config_of(layout, **{**fixed, **changes}), slow, timeout=240)
    events = [event for event in lines(folder / "events.jsonl") if event["kind"] == "straggler"]
    return ranks, events, lines(folder / "rank_times.jsonl")


@pytest.mark.parametrize(
    ("layout", "dtype", "slow"),
    [
        (Layout(2), "fp32", Slow(1)),
        (Layout(2), "fp32", Slow(0, "data")),
        (Layout(2, tp=2), "bf16", Slow(1)),
        (Layout(2, cp=2), "fp32", Slow(1)),
        (Layout(2, zero=3), "fp32", Slow(0)),
        (Layout(2, zero=2), "bf16", Slow(1, "backward")),
        (Layout(4, pp=2, accumulation=2), "fp32", Slow(3, "forward", seconds=SLEEP_SECONDS / 2)),
        (Layout(4, pp=2, accumulation=2), "bf16", Slow(1, "data")),
    ],
    ids=lambda value: f"rank{value.rank}-{value.where}" if isinstance(value, Slow) else str(value),
)
def test_the_slow_rank_is_named_once(tmp_path: Path, layout: Layout, dtype: str, slow: Slow) -> None:
    ranks, events, windows = run(tmp_path / "run", layout, slow, dtype=dtype)
    assert [event["step"] for event in events] == [STEPS], events
    told = events[0]
    assert told["rank"] == slow.rank and told["cause"] == ("data" if slow.where == "data" else "computing"), told
    assert told["stage"] == slow.rank * layout.pp // layout.world and not told["is_over"] and told["host"]
    assert f"rank {slow.rank} on {told['host']}" in told["reason"]
    assert [line for line in ranks[0]["said"] if "straggler" in line] == [f"step {STEPS}: straggler: {told['reason']}"]
    own = windows[0]["own_seconds"]
    assert [window["step"] for window in windows] == [STEPS, 2 * STEPS] and len(own) == layout.world
    assert own[slow.rank] >= SLEEP_SECONDS, "what it slept is its own"
    assert told["ratio"] == pytest.approx(told["own_seconds"] / told["median_seconds"])


@pytest.mark.parametrize("layout", [Layout(2), Layout(2, zero=3)], ids=str)
def test_the_slow_rank_is_named_by_a_streams_clock(tmp_path: Path, layout: Layout) -> None:
    slow = Slow(1, on_a_stream=True)
    ranks, events, windows = run(tmp_path / "run", layout, slow, ds__zero_optimization={"overlap_comm": True})
    assert [(event["rank"], event["cause"]) for event in events] == [(1, "computing")], events
    assert ranks[0]["replaced"] == list(SIDE_STREAMS[: max(0, layout.zero - 1)])
    assert windows[0]["own_seconds"][1] >= SLEEP_SECONDS > 2 * windows[0]["own_seconds"][0]


def test_one_slow_step_names_nobody_and_no_slow_rank_neither(tmp_path: Path) -> None:
    slow = Slow(1, steps=range(STEPS, STEPS + 1), seconds=2.0, everyone=0.2)
    ranks, events, windows = run(tmp_path / "run", Layout(2), slow, over=2.0)
    assert events == [] and all(found["is_counted"] for found in ranks)
    assert windows[0]["own_seconds"][1] < 2.0, "a median"


def test_who_recovers_is_told(tmp_path: Path) -> None:
    # Named from 2.5 times its peers on, well again below 1.75: alone 5 times and once.
    slow = Slow(1, steps=range(1, STEPS + 1), seconds=1.0, everyone=0.25)
    _, events, _ = run(tmp_path / "run", Layout(2), slow, over=1.5)
    assert [(event["step"], event["is_over"]) for event in events] == [(STEPS, False), (2 * STEPS, True)]
    assert events[1]["ranks"] == [1]


@pytest.mark.parametrize(("layout", "dtype"), [(Layout(2, zero=3), "bf16"), (Layout(4, tp=2, pp=2, accumulation=2), "bf16")], ids=str)
def test_counting_changes_no_number_and_off_counts_nothing(tmp_path: Path, layout: Layout, dtype: str) -> None:
    counted, _, windows = run(tmp_path / "on", layout, None, dtype=dtype)
    off = {"interval_steps": 100, "straggler": None}
    plain, events, none = run(tmp_path / "off", layout, None, dtype=dtype, telemetry=off)
    assert curve(tmp_path / "on") == curve(tmp_path / "off"), "bit for bit"
    assert len(windows) == 2 and events == none == []
    assert all(found["is_counted"] and found["gathers"] == [STEPS, 2 * STEPS] and found["has_times"] for found in counted)
    assert not any(found["is_counted"] or found["gathers"] or found["has_times"] for found in plain)
