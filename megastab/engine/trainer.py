"""The training loop: fetch, step, record, and at intervals print, evaluate and save."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from megastab.checkpoint import store
from megastab.checkpoint.manifest import Manifest
from megastab.checkpoint.saver import Outcome, Saver
from megastab.config.config import Config
from megastab.data.skips import Skips
from megastab.data.training import TrainingData
from megastab.engine.build import Built, build
from megastab.engine.heartbeat import Heart
from megastab.engine.processes import HOST
from megastab.engine.replay import replay
from megastab.engine.rewind import Rewinds, rewind
from megastab.engine.run_lock import RunLock, lock_folder
from megastab.engine.signals import StopRequest
from megastab.engine.snapshots import Snapshot, Snapshots
from megastab.engine.train_step import Stepper
from megastab.engine.watch import watching
from megastab.model.counts import flops_per_token, num_parameters
from megastab.parallel import collectives
from megastab.parallel.grid import Grid
from megastab.stability.events import events_of_step
from megastab.stability.record import Event, StepRecord
from megastab.telemetry.pictures import figure_of_heads, figure_of_sample, image_of
from megastab.telemetry.rank_times import rank_times
from megastab.telemetry.sampler import Sample, Sampler
from megastab.telemetry.sinks import (
    RunFolder,
    by_matrix_to_monitor,
    console_line,
    draws_pictures,
    picture_to_monitor,
    restart_monitor,
    sample_to_monitor,
    to_monitor,
)
from megastab.telemetry.straggler import Window
from megastab.telemetry.tags import TAGS, WEIGHT_STD
from megastab.telemetry.throughput import peak_memory_gb, rates

CHECKPOINTS = "checkpoints"  # in the run folder
PICTURE, HEADS_PICTURE = "activations", "attention_heads"  # their names in TensorBoard
# Events that also reach the console.
SAID = ("warning", "skip", "loss_spike", "replay", "rewind", "stop", "massive_activation", "straggler")


class Trainer:
    """One run on one rank."""

    def __init__(self, config: Config, grid: Grid, data: TrainingData):
        self.config, self.grid, self.data = config, grid, data
        run, rank = config.megastab.run, collectives.world()[0]
        self.step, self.checkpoints = 0, Path(run.dir) / CHECKPOINTS
        # Before anything is built or written: a checkpoint that does not fit must leave its folder as it is.
        wanted = Manifest.of(config, 0, 0, data.tokenizer)
        self.damaged: list[str] = []
        self.origin = store.find(run.resume, self.checkpoints, wanted, self.damaged.append)
        with collectives.together("reading what was taken back"):
            self.rewinds = Rewinds(Path(run.dir)) if run.resume == "none" else Rewinds.read(Path(run.dir))
        self.rewinds.taken = collectives.from_first(self.rewinds.taken)  # a slow file system may show another rank less
        self.folder = RunFolder(run.dir, is_writer=False)
        self.lock: RunLock | None = None
        with collectives.together("taking the run folder"):
            if rank == 0:
                self.folder, self.lock = lock_folder(Path(run.dir), is_new=run.resume == "none")
        self.heart, self.stop = Heart(Path(run.dir), rank), StopRequest()
        self.left_out = self.rewinds.skips
        """What rewinds have left out, here and in the run this one goes on from."""
        self.built: Built = build(config, grid, is_new=self.origin is None)
        self.engine: Any = self.built.engine
        self.snapshots = Snapshots(config.megastab.stability.policy, self.built.adapter)
        self.saver = Saver(self.built.adapter, grid, self.checkpoints, run.keep_last, run.keep_every, in_background=run.async_save)
        self.stepper = Stepper(self.engine, config, grid)
        self.built.controller.read_loss = self.stepper.loss_at_norm
        self.sampler = Sampler(config.megastab.telemetry, self.built.controller, config.megastab.model.num_layers)
        self.rank_times = rank_times(config.megastab.telemetry.straggler, self.built.adapter, grid, HOST)
        self.flops = flops_per_token(config.megastab.model)
        self.last: StepRecord | None = None
        self._saved_step, self._unsaved = 0, False
        self.leave_out(self.left_out)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """While inside signals stop the run in order, a hang or a dead neighbour ends it, and the folder stays locked."""
        try:
            with self.stop.listening(), watching(self.heart, self.config.megastab.run, self.stop, self.lock):
                yield
        finally:
            if self.lock is not None:
                self.lock.release()

    def announce(self) -> None:
        """Say on the console what will run, and keep the resolved config."""
        config, layout = self.config, self.config.layout
        shared = f"context {layout.context} x " if layout.context > 1 else ""
        self.folder.write_config(config.resolved())
        wrapper = type(self.engine.optimizer).__name__
        self.folder.say(
            f"{num_parameters(config.megastab.model) / 1e6:.1f} M parameters, {config.precision}; tensor {layout.tensor} x pipeline "
            f"{layout.pipeline} x {shared}data {layout.data}, ZeRO {config.zero_stage} ({wrapper}); {config.tokens_per_step} tokens a step"
        )
        for completion in config.completions:
            self.folder.say(f"  set {completion.key} = {completion.value}: {completion.reason}")
        self.folder.say(f"  decay: {self.built.groups}")
        if self.origin is None and config.megastab.run.init_from is not None:
            self.folder.say(f"  weights from {config.megastab.run.init_from}; optimizer, schedule and data start anew")
        if config.warmup_steps > config.total_steps:
            self.folder.say(f"  note: the warm-up of {config.warmup_steps} steps outlasts the run of {config.total_steps}")

    def manifest(self) -> Manifest:
        """Where the run is."""
        stability = self.built.controller.state_dict()
        made = Manifest.of(self.config, self.step, self.data.train.consumed, self.data.tokenizer, stability)
        return replace(made, skips=[list(pair) for pair in self.left_out.ranges])

    def resume(self) -> None:
        """Go on from the checkpoint the config names, if there is one (collective over the job)."""
        if self.origin is None:
            self.forget_after(0)  # of a run that ended before its first checkpoint
            return
        manifest = self.load(self.origin)
        if self.folder.is_writer and self.origin.parent == self.checkpoints:
            store.name_as_latest(self.origin)
        self.leave_out(Skips.of(manifest.skips))
        for change in self.built.controller.load_state_dict(manifest.stability):
            self.folder.event(Event(self.step, "settings", change))
            self.folder.say(f"  note: {change}")
        self.forget_after(self.step)
        self.tell([Event(self.step, "warning", said) for said in self.damaged])
        change = manifest.change_of_shape(self.manifest())
        self.folder.event(Event(self.step, "resume", f"from {self.origin}{f' in another shape: {change}' if change else ''}"))
        if change:
            self.folder.say(f"  the checkpoint has another shape: {change}")
        self.folder.say(f"resumed from {self.origin} at step {self.step}, {manifest.consumed} samples consumed")

    def load(self, where: Path) -> Manifest:
        """Weights, optimizer and position of a checkpoint (collective over the job)."""
        self.heart.beat(self.step, "loading")
        manifest = store.load(self.built.adapter, where)
        self._stand_at(manifest)
        self._saved_step = self.step
        return manifest

    def restore(self, snapshot: Snapshot) -> Manifest:
        """The same of a copy in memory."""
        manifest = self.snapshots.restore(snapshot)
        self._stand_at(manifest)
        self._saved_step = 0  # this very state is on no disk
        return manifest

    def _stand_at(self, manifest: Manifest) -> None:
        self.step, self.data.train.consumed = manifest.step, manifest.consumed
        self.snapshots.forget_after(self.step)
        if self.rank_times is not None:
            self.rank_times.restart()

    def leave_out(self, more: Skips) -> None:
        """From here on, without these samples."""
        self.left_out |= more
        self.data.train.skips = Skips.of(self.config.megastab.data.skip) | self.left_out

    def forget_after(self, step: int) -> None:
        """What was logged after ``step`` comes again."""
        self.folder.drop_after(step)
        self.sampler.remember(self.folder.told())
        if self.folder.is_writer:
            restart_monitor(self.engine.monitor, step)

    def train(self) -> bool:
        """Run to the last step; the final weights are evaluated and saved. False if the run was stopped before, and saved."""
        run, total = self.config.megastab.run, self.config.total_steps
        if self.step == 0 and (said := self.built.controller.start_warning()):
            self.tell([Event(0, "warning", said)])
        if self.step and self._is_to_evaluate() and collectives.from_first(self.folder.lacks_evaluation(self.step)):
            self.evaluate()  # the run was asked to stop in the midst of it
        while self.step < total:
            if self.stop.poll():
                self._leave()
                return False
            self.heart.beat(self.step, "training")
            record, extra = self.take_step()
            self.tell_saved(self.saver.poll())
            if self.step < record.step:
                continue  # it went back
            self.snapshots.keep(self.step, self.built.controller.policy.bad_in_a_row == 0, self.manifest)
            is_last = self.step == total
            if self.step % run.log_interval == 0 or is_last or self.step == 1:
                self.folder.say(console_line(record, total, extra))
            if self._is_to_evaluate():
                self.evaluate()
            if is_last or (run.save_interval and self.step % run.save_interval == 0):
                self.save()
        self.tell_saved(self.saver.finish())
        return True

    def _leave(self) -> None:
        """Asked to stop: save what is not, and say so."""
        if self.step > self._saved_step:
            self.save()
        self.tell_saved(self.saver.finish())
        if collectives.from_first(self._unsaved):
            collectives.fail_alike("asked to stop, but the last steps could not be saved: older checkpoints stand")
        self.stop.saved()
        asked = ", ".join(sorted({name for name in collectives.gather_objects(self.stop.asked) if name}))
        self.tell([Event(self.step, "stop", f"{asked}: saved, and left; megastab.run.resume = auto goes on from here")])

    def take_step(self) -> tuple[StepRecord, dict[str, float]]:
        """One optimizer step and its record."""
        if self.rank_times is not None:
            self.rank_times.begin()
        began = time.perf_counter()
        batches = self.data.train.next_step()
        fetched = time.perf_counter()
        lr = float(self.engine.optimizer.param_groups[0]["lr"])
        with self.sampler.looking(self.step + 1, batches):
            loss = self.stepper.train(batches)
        controller = self.built.controller
        controller.step_done()
        sample = self.sampler.finish()
        seconds = time.perf_counter() - began
        if self.rank_times is not None:
            self.rank_times.end(seconds, fetched - began)
        self.step += 1
        tokens = self.config.tokens_per_step
        record = controller.record(step=self.step, loss=loss, lr=lr, tokens=tokens, seconds=seconds)
        verdict = controller.judge(self.step, loss)
        extra = rates(record.tokens, seconds, self.flops, self.config.layout.world)
        extra |= {"data_seconds": fetched - began, "memory_gb": peak_memory_gb(), **controller.scalars()}
        self._publish(record, extra)
        if sample is not None:
            self._publish_sample(sample)
        if self.rank_times is not None and (window := self.rank_times.window(self.step)) is not None:
            self._publish_rank_times(window)
        samples = self.data.train.last_step
        assert samples is not None
        self.tell(events_of_step(controller, record, verdict, samples, self.data.train.skips.within(*samples)))
        if controller.policy.wants_replay:
            found = replay(self.engine, self.stepper, controller, batches)
            self.tell([Event(self.step, "replay", found.describe(), found.facts())])
        if verdict.rewind:
            rewind(self, verdict)
        return record, extra

    def _publish(self, record: StepRecord, extra: dict[str, float]) -> None:
        self.last = record
        self.folder.step(record, extra)
        if self.folder.is_writer:
            scalars = {key: value for key, value in record.to_json().items() if key in TAGS and value is not None}
            to_monitor(self.engine.monitor, record.step, {**scalars, **extra})
            by_matrix_to_monitor(self.engine.monitor, record.step, WEIGHT_STD, self.built.controller.weight_stds)

    def _publish_sample(self, sample: Sample) -> None:
        if self.folder.is_writer:
            self.folder.sample(sample.to_json())
            monitor = self.engine.monitor
            sample_to_monitor(monitor, sample.step, sample.by_tag())
            if sample.activations and draws_pictures(monitor):
                picture_to_monitor(monitor, sample.step, PICTURE, image_of(figure_of_sample(sample)))
            if sample.attention and draws_pictures(monitor):
                picture_to_monitor(monitor, sample.step, HEADS_PICTURE, image_of(figure_of_heads(sample)))
        self.tell(self.sampler.events(sample))

    def _publish_rank_times(self, window: Window) -> None:
        if self.folder.is_writer:
            self.folder.rank_times(window.to_json())
            to_monitor(self.engine.monitor, window.step, window.scalars())
        self.tell(window.events)

    def tell(self, events: Sequence[Event]) -> None:
        """Into events.jsonl, and what a person at the console should not miss there as well."""
        for event in events:
            self.folder.event(event)
            if event.kind in SAID:
                self.folder.say(f"step {event.step}: {event.kind}: {event.reason}")

    def _is_to_evaluate(self) -> bool:
        every = self.config.megastab.run.eval_interval
        return self.step == self.config.total_steps or bool(every and self.step % every == 0)

    def evaluate(self) -> float | None:
        """Validation loss, printed and logged; None without validation data, or where the run was asked to stop meanwhile."""
        if self.data.valid is None:
            return None
        loss = self.stepper.evaluate(self.data.valid, self._goes_on)
        if loss is None:
            self.tell([Event(self.step, "stop", "the evaluation of this step was left out")])
            return None
        values = {"valid_loss": loss}
        said = f"valid loss {loss:.4f}  perplexity {math.exp(min(loss, 50)):.2f}"
        if (text := self.data.valid_text) is not None:
            bits = values["valid_bits_per_byte"] = loss / math.log(2) / text.bytes_per_token
            below = 100 * (1 - bits / text.unigram_bits_per_byte)
            side = f"{below:.1f} % below" if below >= 0 else f"{-below:.1f} % above"
            said += f"  {bits:.4f} bits/byte, {side} the unigram entropy ({text.unigram_bits_per_byte:.4f})"
        self.folder.say(f"step {self.step}/{self.config.total_steps}  {said}")
        self.folder.evaluation(self.step, values)
        if self.folder.is_writer:
            to_monitor(self.engine.monitor, self.step, values)
        return loss

    def _goes_on(self) -> bool:
        self.heart.beat(self.step, "evaluating")
        return not self.stop.poll()

    def save(self) -> None:
        """One checkpoint (collective over the job). Where it cannot be written the run says so and goes on."""
        self.heart.beat(self.step, "saving")
        self.tell_saved(self.saver.save(self.manifest()))
        self._saved_step = self.step

    def tell_saved(self, ended: Sequence[Outcome]) -> None:
        """How checkpoints ended, into events.jsonl."""
        for step, where, failure in ended:
            self._unsaved = bool(failure)
            self.tell([Event(step, "warning", failure) if failure else Event(step, "save", str(where))])
