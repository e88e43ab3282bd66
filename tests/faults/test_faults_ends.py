"""How a run ends when it is asked to, when a rank dies and when one hangs; and that it goes on afterwards as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.faults.planted import AtMoment, pretrain
from tests.launching import curve, launch
from tests.ranks import TIMEOUT, start_job

STEPS = 8


@pytest.fixture
def config(tiny_config: dict[str, Any]) -> dict[str, Any]:
    """ZeRO 2 over two ranks, saved every third step."""
    tiny_config["zero_optimization"] = {"stage": 2}
    tiny_config["megastab"]["stability"] = {"zclip": {"warmup_steps": 2, "z_thresh": 0.3}}
    tiny_config["megastab"]["run"] |= {"total_steps": STEPS, "save_interval": 3, "eval_interval": 4, "log_interval": 1}
    return tiny_config


def run_to_its_end(
    config: dict[str, Any], log: Path, fault: AtMoment | None = None, timeout: float = TIMEOUT
) -> tuple[list[int | None], str]:
    codes = start_job(2, log, pretrain, config, fault).codes(timeout)
    return codes, log.read_text()


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, text_data: Path) -> dict[str, Any]:
    return {}


def uninterrupted(config: dict[str, Any], kept: dict[str, Any], folder: Path) -> list[tuple[int, float, float, float]]:
    """The curve of a run nobody touched, made once."""
    if not kept:
        own = json.loads(json.dumps(config))
        own["megastab"]["run"]["dir"] = str(folder / "whole")
        codes, text = run_to_its_end(own, folder / "whole.log")
        assert codes == [0, 0], text
        kept["curve"], kept["evaluations"] = curve(folder / "whole"), evaluations(folder / "whole")
    found: list[tuple[int, float, float, float]] = kept["curve"]
    return found


def evaluations(run: Path) -> list[tuple[int, float]]:
    """Step and validation loss of every evaluation of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["valid_loss"]) for line in lines if "valid_loss" in line]


@pytest.mark.parametrize(
    ("method", "step", "name", "stopped_at"),
    # Handed to the other ranks at the first look after it, obeyed at the second; an evaluation looks twice here.
    [("take_step", 1, "SIGTERM", 3), ("evaluate", 4, "SIGUSR1", 4), ("save", 6, "SIGINT", 7)],
    ids=["training", "evaluating", "saving"],
)
def test_asked_to_stop_it_saves_leaves_and_goes_on_later(
    method: str, step: int, name: str, stopped_at: int, config: dict[str, Any], whole: dict[str, Any], tmp_path: Path
) -> None:
    expected, run = uninterrupted(config, whole, tmp_path), tmp_path / "run"
    codes, text = run_to_its_end(config, tmp_path / "first.log", AtMoment(method, step, name))
    assert codes == [85, 85], text
    assert (run / "checkpoints" / "latest").read_text() == f"step{stopped_at:08d}" and not (run / "lock").exists()
    assert f"step {stopped_at}: stop: {name}: saved, and left" in text and "Traceback" not in text
    saved = [json.loads(line)["step"] for line in (run / "events.jsonl").read_text().splitlines() if '"save"' in line]
    assert saved == sorted({*range(3, stopped_at + 1, 3), stopped_at})  # none twice
    assert ("evaluation of this step was left out" in text) == (method == "evaluate")
    codes, text = run_to_its_end(config, tmp_path / "second.log")
    assert codes == [0, 0] and f"at step {stopped_at}," in text, text
    assert curve(run) == expected
    assert evaluations(run) == whole["evaluations"] and [step for step, _ in evaluations(run)] == [4, 8]  # one cut off is made up for


@pytest.mark.parametrize(("method", "step", "first"), [("take_step", 2, 4), ("evaluate", 4, 4)], ids=["training", "evaluating"])
def test_pipeline_stages_leave_at_the_same_step(method: str, step: int, first: int, config: dict[str, Any], tmp_path: Path) -> None:
    """Each is asked by itself, at a moment of its own or not at all; a stage that left alone would leave the other waiting."""
    config |= {"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 2}
    config["megastab"]["parallel"] = {"pipeline": 2}
    config["megastab"]["run"]["total_steps"] = 40  # far away
    fault = AtMoment(method, step, "SIGTERM", random.Random(step).uniform(0, 0.03), everyone=method == "evaluate")
    codes, text = run_to_its_end(config, tmp_path / "log", fault)
    assert codes == [85, 85] and text.count("stop: SIGTERM: saved, and left") == 1, text
    stopped_at = int((tmp_path / "run" / "checkpoints" / "latest").read_text().removeprefix("step"))
    assert first <= stopped_at < 40 and len(curve(tmp_path / "run")) == stopped_at, text


def check_killed(config: dict[str, Any], expected: Any, fault: AtMoment, tmp_path: Path, label: str) -> str:
    """Kill rank 1 as told, start again, compare; what to log of it."""
    own = json.loads(json.dumps(config))
    run = tmp_path / label
    own["megastab"]["run"]["dir"] = str(run)
    codes, text = run_to_its_end(own, tmp_path / f"{label}.log", fault)
    # Rank 0 is told of the death by the backend or by the watch; killed itself a moment later, it may have been told before.
    told = {-9, 1, 87} if fault.everyone else {1, 87}
    assert -9 in codes and set(codes) <= {-9, *told} and (fault.everyone or codes[1] == -9), (codes, text)
    latest = run / "checkpoints" / "latest"
    went_on_from = latest.read_text() if latest.exists() else "the start"
    codes, text = run_to_its_end(own, tmp_path / f"{label}-again.log")
    assert codes == [0, 0] and curve(run) == expected, text
    who = "every rank" if fault.everyone else "rank 1"
    return f"{who}, {fault.method} after step {fault.step}, {fault.seconds:.3f} s later: went on from {went_on_from}"


MOMENTS = [
    AtMoment("take_step", random.Random(seed).randrange(STEPS - 1), "kill", random.Random(seed).uniform(0, 0.03)) for seed in range(2)
]
MOMENTS.append(AtMoment("take_step", 5, "kill", random.Random(2).uniform(0, 0.03), everyone=True))


@pytest.mark.parametrize("fault", [*MOMENTS, AtMoment("save", 6, "kill", 0.02)], ids=["seed0", "seed1", "seed2, every rank", "saving"])
def test_a_killed_rank_ends_the_job_and_the_run_goes_on(
    fault: AtMoment, config: dict[str, Any], whole: dict[str, Any], tmp_path: Path
) -> None:
    check_killed(config, uninterrupted(config, whole, tmp_path), fault, tmp_path, "killed")


@pytest.mark.long
def test_thirty_random_moments(config: dict[str, Any], whole: dict[str, Any], tmp_path: Path) -> None:
    """Prints a line each; kept in docs/faults_kills.md."""
    expected, draw = uninterrupted(config, whole, tmp_path), random.Random(30)
    for number in range(30):
        method, steps = ("save", (3, 6)) if number % 3 == 0 else ("take_step", tuple(range(STEPS - 1)))
        fault = AtMoment(method, draw.choice(steps), "kill", draw.uniform(0, 0.03), number % 5 == 4)
        print(number, check_killed(config, expected, fault, tmp_path, f"killed{number}"))


@pytest.mark.parametrize(
    ("does", "said"),
    [("stop", "does not answer: stopped, or its machine is gone"), ("sleep", "rank 1 stands in planted.py")],
    ids=["stopped", "sleeping"],
)
def test_a_hung_rank_is_named(does: str, said: str, config: dict[str, Any], tmp_path: Path) -> None:
    config["megastab"]["run"]["hang_seconds"] = 8.0
    job = start_job(2, tmp_path / "log", pretrain, config, AtMoment("take_step", 2, does))
    job.processes[0].join(120)
    codes, text = job.codes(0.1 if does == "stop" else 30), job.log.read_text()
    assert codes[0] == 87, (codes, text)
    assert f"no progress for 8 seconds: rank 1 on {socket.gethostname()} (process " in text and "training after step 2" in text
    assert said in text and "fetch_from_a_dead_disk" in text or does == "stop", text
    (event,) = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines() if '"hang"' in line]
    assert event["step"] == 2 and said.split(":")[0] in event["reason"]


def watch_a_peer_die(folder: str) -> None:
    """On a rank: no collective is under way when rank 1 dies."""
    import signal
    import time

    from megastab.config.schema import RunConfig
    from megastab.engine.heartbeat import Heart
    from megastab.engine.signals import StopRequest
    from megastab.engine.watch import watching
    from megastab.parallel import collectives

    rank, stop = collectives.world()[0], StopRequest()
    with stop.listening(), watching(Heart(Path(folder), rank), RunConfig(), stop, None):
        collectives.barrier()  # who is gone before the other looks for the first time may be one its container hides
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


def test_a_dead_neighbour_is_seen_by_itself(tmp_path: Path) -> None:
    job = start_job(2, tmp_path / "log", watch_a_peer_die, str(tmp_path))
    assert job.codes(40) == [87, -9]
    assert "rank 1 on" in job.log.read_text() and "is gone" in job.log.read_text()


def ask_twice(again_seconds: float, stop_seconds: float | None) -> None:
    """On a rank: a loop that never looks whether it was asked to stop."""
    import signal
    import time

    from megastab.config.schema import RunConfig
    from megastab.engine import signals
    from megastab.engine.heartbeat import Heart
    from megastab.engine.watch import watching

    signals.AGAIN_SECONDS = again_seconds
    stop, folder = signals.StopRequest(), Path(os.environ["TMPDIR_OF_TEST"])
    with stop.listening(), watching(Heart(folder, 0), RunConfig(stop_seconds=stop_seconds), stop, None):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(4)


def in_folder(folder: str, *args: Any) -> None:
    os.environ["TMPDIR_OF_TEST"] = folder
    ask_twice(*args)


@pytest.mark.parametrize(
    ("again", "limit", "code"), [(0.1, None, 143), (5.0, None, 0), (5.0, 1.0, 87)], ids=["again", "forwarded twice", "out of time"]
)
def test_a_second_signal_or_the_limit_ends_it_at_once(again: float, limit: float | None, code: int, tmp_path: Path) -> None:
    job = start_job(1, tmp_path / "log", in_folder, str(tmp_path), again, limit)
    assert job.codes(40) == [code], job.log.read_text()


def test_a_second_run_in_the_folder_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    from megastab.engine.run_lock import RunLock

    lock = RunLock.take(tmp_path / "run")  # this process lives
    codes, text = run_to_its_end(config, tmp_path / "log")
    assert codes == [2, 2] and text.count("error: ") == 1 and f"in use by another run (process {os.getpid()} on" in text, text
    assert lock.path.exists() and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_launcher_hands_the_exit_code_on(config_file: Path, tmp_path: Path) -> None:
    done = launch("--deepspeed_config", str(config_file), script="tests/faults/asked_to_stop.py", timeout=180)
    assert done.code == 85 and "SIGTERM: saved, and left" in done.text and "Traceback" not in done.text, done.text
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step00000003"


def leave_while_signals_come() -> None:
    """On a rank: the run is saved, and launchers go on sending."""
    import signal

    from megastab.engine.signals import StopRequest

    stop = StopRequest()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.asked == "SIGUSR1" and stop.poll()
        stop.saved()
    os.kill(os.getpid(), signal.SIGTERM)


def test_once_it_is_saved_no_signal_changes_the_exit_code(tmp_path: Path) -> None:
    job = start_job(1, tmp_path / "log", leave_while_signals_come)
    assert job.codes(40) == [0], job.log.read_text()
