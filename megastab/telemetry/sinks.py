"""Where the numbers go: the console, ``metrics.jsonl``, ``events.jsonl``, and TensorBoard through DeepSpeed's monitor. Rank 0 only."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megastab.stability.record import Event, StepRecord
from megastab.telemetry.tags import SAMPLED, TAGS, Tag


class RunFolder:
    """The files of one run; a rank that is not the writer may call everything and nothing happens.

    With ``is_new`` a folder that already holds a run is moved aside, to ``NAME.1`` and so on: nothing is ever overwritten.
    """

    def __init__(self, path: str | Path, is_writer: bool, is_new: bool = False):
        self.path, self.is_writer = Path(path), is_writer
        self.kept: Path | None = None
        """Where the earlier run was moved to."""
        if not is_writer:
            return
        if is_new and (self.path / "config.json").exists():
            kept = next(aside for n in itertools.count(1) if not (aside := Path(f"{self.path}.{n}")).exists())
            self.path.rename(kept)
            self.kept = kept
            self.say(f"{self.path} held an earlier run, kept as {kept}")
        self.path.mkdir(parents=True, exist_ok=True)

    def write_config(self, resolved: Mapping[str, Any]) -> None:
        """The resolved config, loadable again."""
        if self.is_writer:
            (self.path / "config.json").write_text(json.dumps(resolved, indent=2) + "\n")

    def drop_after(self, step: int) -> None:
        """On resume or after a rewind, forget the numbers logged after ``step``: those steps are taken again.

        Events are never lost: those of the steps taken back are kept with ``"undone": true``.
        """
        if not self.is_writer:
            return
        for name in ("metrics.jsonl", "telemetry.jsonl", "rank_times.jsonl"):
            self._rewrite(name, lambda line: line if _step_of(line) <= step else None)
        self._rewrite("events.jsonl", lambda line: line if _step_of(line) <= step else _undone(line))

    def _rewrite(self, name: str, change: Callable[[str], str | None]) -> None:
        """Every line as ``change`` has it, without those that become None; a crash leaves the old file or the new one."""
        path = self.path / name
        if path.exists():
            kept = [line for old in path.read_text().splitlines() if (line := change(old)) is not None]
            aside = path.with_suffix(".new")
            aside.write_text("".join(f"{line}\n" for line in kept))
            os.replace(aside, path)

    def step(self, record: StepRecord, extra: Mapping[str, float]) -> None:
        """One line of metrics.jsonl."""
        self._append("metrics.jsonl", {**record.to_json(), **extra})

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl for an evaluation: its own keys beside the step."""
        self._append("metrics.jsonl", {"step": step, **values})

    def lacks_evaluation(self, step: int) -> bool:
        """Whether the file has the numbers of ``step`` but no evaluation after it; False where this rank does not write."""
        path = self.path / "metrics.jsonl"
        if not self.is_writer or not path.exists():
            return False
        of_step = [json.loads(line) for line in path.read_text().splitlines() if _step_of(line) == step]
        return bool(of_step) and not any("valid_loss" in line for line in of_step)

    def event(self, event: Event) -> None:
        """One line of events.jsonl."""
        self._append("events.jsonl", event.to_json())

    def sample(self, line: Mapping[str, Any]) -> None:
        """One line of telemetry.jsonl."""
        self._append("telemetry.jsonl", line)

    def rank_times(self, line: Mapping[str, Any]) -> None:
        """One line of rank_times.jsonl."""
        self._append("rank_times.jsonl", line)

    def told(self) -> list[dict[str, Any]]:
        """The lines of events.jsonl that stand; none where this rank does not write, or the file cannot be read."""
        path = self.path / "events.jsonl"
        if not self.is_writer or not path.exists():
            return []
        lines = [json.loads(line) for line in path.read_text().splitlines() if _step_of(line) < 1 << 62]
        return [line for line in lines if not line.get("undone")]

    def say(self, text: str) -> None:
        """One line on the console."""
        if self.is_writer:
            print(text, flush=True)

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        if self.is_writer:
            with open(self.path / name, "a") as file:
                file.write(json.dumps(values) + "\n")


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # a line cut off by a crash


def _undone(line: str) -> str | None:
    """An event of a step taken back; None for a line cut off by a crash. A rewind stands: what it left out stays out."""
    if _step_of(line) == 1 << 62:
        return None
    event = json.loads(line)
    return line if event.get("kind") == "rewind" else json.dumps({**event, "undone": True})


def restart_monitor(monitor: Any, step: int) -> None:
    """Have TensorBoard drop the points after ``step``: they come again (on rank 0, where the JSON enables it)."""
    writer = getattr(getattr(monitor, "tb_monitor", None), "summary_writer", None)
    if writer is not None:
        from tensorboard.compat.proto.event_pb2 import Event as Record
        from tensorboard.compat.proto.event_pb2 import SessionLog

        writer.file_writer.add_event(Record(session_log=SessionLog(status=SessionLog.START)), step + 1)


def to_monitor(monitor: Any, step: int, values: Mapping[str, float]) -> None:
    """Send scalars, named by tag key, to DeepSpeed's monitor (TensorBoard, csv, wandb: whatever the JSON enables)."""
    if monitor.enabled:
        monitor.write_events([(TAGS[key].name, float(value), step) for key, value in values.items() if key in TAGS])


def by_matrix_to_monitor(monitor: Any, step: int, tag: Tag, values: Mapping[str, float]) -> None:
    """Send one scalar a matrix, by canonical name."""
    if monitor.enabled:
        monitor.write_events([(f"{tag.name}/{name}", float(value), step) for name, value in values.items()])


def sample_to_monitor(monitor: Any, step: int, values: Mapping[str, Mapping[str, float]]) -> None:
    """Send the scalars of one sampled step: by key of ``SAMPLED``, then by place or matrix."""
    if monitor.enabled:
        named = [(f"{SAMPLED[key].name}/{name}", value) for key, of in values.items() for name, value in of.items()]
        monitor.write_events([(name, float(value), step) for name, value in named])


def draws_pictures(monitor: Any) -> bool:
    """Whether TensorBoard is there to take a picture (on rank 0, where the JSON enables it)."""
    return getattr(getattr(monitor, "tb_monitor", None), "summary_writer", None) is not None


def picture_to_monitor(monitor: Any, step: int, name: str, image: Any) -> None:
    """Send an array [height, width, 3] to TensorBoard: DeepSpeed's monitor itself takes scalars only."""
    monitor.tb_monitor.summary_writer.add_image(name, image, step, dataformats="HWC")


def console_line(record: StepRecord, total_steps: int, extra: Mapping[str, float]) -> str:
    """``step 20/100  loss 5.1234  norm 1.234  lr 1.0e-03  12.3k tokens/s  ...``."""
    parts = [
        f"step {record.step:>{len(str(total_steps))}}/{total_steps}",
        f"loss {record.loss:.4f}",
        f"norm {record.grad_norm:.3f}{_decision(record)}",
        f"lr {record.lr:.2e}",
        f"{extra['tokens_per_second'] / 1e3:.1f}k tokens/s",
        f"{extra['model_tflops']:.2f} TFLOP/s/rank",
    ]
    if "mfu" in extra:
        parts.append(f"MFU {100 * extra['mfu']:.1f} %")
    parts.append(f"{extra['memory_gb']:.2f} GB")
    return "  ".join(parts)


def _decision(record: StepRecord) -> str:
    """What was done to the norm, where that was something."""
    if record.action == "skip":
        return f" skipped ({record.reason})"
    if record.action == "clip":
        return f" clipped to {record.grad_norm * record.clip_scale:.3f}" + (f" (z {record.z:.1f})" if record.z is not None else "")
    return ""
