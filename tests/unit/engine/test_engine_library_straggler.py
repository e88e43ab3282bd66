"""Somebody else's loop with a slow rank: it is named in the log, whatever it does between its steps; off where nobody asked."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.unit.engine.test_engine_library import config_of, llama, take_step

STEPS = 5
EVERYONE, MORE = 0.25, 1.0  # seconds slept by every rank and by the slow one: 5 times; named from 2.5 times on, well below 1.75


def loop(telemetry: dict[str, Any] | None, stage: int) -> dict[str, Any]:
    """Two windows, in the first of which rank 1 sleeps before each step."""
    import megastab
    from megastab.parallel import collectives
    from megastab.parallel.waiting import Counted

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megastab").addHandler(handler)
    block = {"stability": {}} | ({} if telemetry is None else {"telemetry": telemetry})
    engine, *_ = megastab.initialize(model=llama(), config={**config_of(stage, "fp32"), "megastab": block})
    collectives.barrier()
    counts = engine.stability.rank_times is not None and len(engine.stability.rank_times.waiting._spans)
    for step in range(1, 2 * STEPS + 1):
        time.sleep(EVERYONE + (MORE if collectives.world()[0] == 1 and step <= STEPS else 0.0))
        take_step(engine, step)
    times = engine.stability.rank_times
    facts = {"said": [line for line in said if "straggler" in line], "counts": counts, "is_counted": isinstance(collectives.dist, Counted)}
    return facts | {"last": None if times is None else times.last.own}


@pytest.mark.parametrize("stage", [0, 3])
def test_a_slow_rank_is_named_in_the_log(stage: int) -> None:
    asked = {"interval_steps": None, "straggler": {"steps": STEPS, "over": 1.5}}
    first, second = run_ranks(2, loop, asked, stage)
    begins, over = first["said"]
    assert "step 5: straggler: rank 1 on " in begins and "slow at" not in begins, "its data and its computing are one to us"
    assert "step 10: straggler: rank 1 is as fast as the others again" in over
    assert first["counts"] == second["counts"] == 1, "from the first step on"
    assert second["said"] == [] and first["last"] == second["last"], "equal on both, told by one"


def test_nobody_asked_and_nothing_is_counted() -> None:
    for found in run_ranks(2, loop, None, 0):
        assert found["said"] == [] and found["last"] is None and not found["is_counted"]
