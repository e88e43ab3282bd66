"""Asked to stop at any moment, on any ranks: all leave at the same look, one after the request, and no look waits for a slower rank."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest

from tests.ranks import run_ranks

SEEDS = range(12)


def leave(seed: int) -> tuple[int, int | None]:
    """On a rank: how many looks it took until it left, and at which of them it knew of a signal of its own. Steps meet nobody."""
    from megastab.engine.signals import SIGNALS, StopRequest
    from megastab.parallel import collectives

    rank, size = collectives.world()
    alike, own, stop = random.Random(seed), random.Random(f"{seed} {rank}"), StopRequest()
    asked = alike.sample(range(size), alike.choice([1, 1, size]))
    looks, knew = 0, None
    if rank in asked:
        threading.Timer(own.uniform(0, 0.06), os.kill, (os.getpid(), own.choice(SIGNALS))).start()
    with stop.listening():
        while True:
            looks += 1
            knew = looks if stop.asked and knew is None else knew
            if stop.poll():
                break
            if own.random() < 0.8:  # else it comes at once, as between micro-batches of an evaluation
                time.sleep(own.uniform(0, 0.01))
        stop.saved()  # a second signal may still be on its way
    return looks, knew


def leave_often() -> list[tuple[int, int | None]]:
    return [leave(seed) for seed in SEEDS]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_all_ranks_leave_at_the_same_look(world: int) -> None:
    for seed, found in zip(SEEDS, zip(*run_ranks(world, leave_often), strict=True), strict=True):
        (looks,) = {looks for looks, _ in found}  # on every rank
        first = min(knew for _, knew in found if knew is not None)
        # A signal that came between this test's glance and the look itself was handed on by the look before.
        assert looks in (first, first + 1), (seed, found)


def flags_found() -> tuple[list[int], list[bool]]:
    """On a rank: the sizes of its groups; what it hears when each rank in turn is the only one asked, and when none is."""
    from megastab.parallel import collectives

    (rank, size), channel = collectives.world(), collectives.own_channel()
    return [collectives.group_size(group) for group in channel], [collectives.any_of(rank == asked, channel) for asked in range(size + 1)]


@pytest.mark.parametrize(("world", "groups"), [(1, []), (3, [3]), (4, [2, 2]), (6, [3, 2])])
def test_each_rank_is_heard_by_all_and_connected_to_its_row_and_column_only(world: int, groups: list[int]) -> None:
    assert run_ranks(world, flags_found) == [(groups, [True] * world + [False])] * world


def look_one_after_the_other(folder: Path) -> tuple[bool, bool]:
    """On a rank: the first looks, and only then lets the second look. What it found; whether the second had come when it was done."""
    from megastab.engine.signals import StopRequest
    from megastab.parallel import collectives

    stop, looked, comes = StopRequest(), folder / "looked", folder / "comes"
    with stop.listening():
        if collectives.world()[0] == 1:
            while not looked.exists():
                time.sleep(0.01)
            time.sleep(0.5)
            comes.touch()
        found = stop.poll()
        looked.touch()
    return found, comes.exists()


def test_a_look_waits_for_nobody_but_nobody_leaves_with_a_question_open(tmp_path: Path) -> None:
    assert run_ranks(2, look_one_after_the_other, tmp_path, timeout=60) == [(False, True)] * 2


def place_of_a_look() -> tuple[str, bool]:
    """On a rank: what the watch sees of a rank whose second look waits for the other's first."""
    from megastab.engine.signals import StopRequest
    from megastab.engine.watch import place_of
    from megastab.parallel import collectives

    stop, main, seen = StopRequest(), threading.main_thread().ident, ("", False)

    def see() -> None:
        nonlocal seen
        time.sleep(0.5)
        seen = place_of(main)

    with stop.listening():
        if collectives.world()[0] == 0:
            threading.Thread(target=see).start()
        else:
            time.sleep(1.5)
        stop.poll()
        stop.poll()
    return seen


def test_a_rank_that_waits_in_a_look_is_not_the_one_that_hangs() -> None:
    (where, is_waiting), _ = run_ranks(2, place_of_a_look)
    assert is_waiting and "signals.py" in where
