"""The written reason of a step: every decision that was not an ordinary one, as lines of ``events.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megastab.stability.controller import Controller
from megastab.stability.policy import Verdict
from megastab.stability.qk_clip import QKClip
from megastab.stability.record import Event, StepRecord


def events_of_step(
    controller: Controller,
    record: StepRecord,
    verdict: Verdict,
    samples: tuple[int, int] | None = None,
    left_out: Sequence[Sequence[int]] = (),
) -> list[Event]:
    """What there is to tell of the step just taken; nothing for an ordinary one.

    Args:
        controller: after its ``step_done``.
        record: of that step.
        verdict: the policy's.
        samples: ids of the first and the last sample of its batch, where they are known.
        left_out: (first, last) of what the batch leaves out between these.
    """
    facts: dict[str, Any] = {
        "loss": record.loss,
        "norm": record.grad_norm,
        "z": record.z,
        "threshold": record.clip_threshold,
        "scale": record.clip_scale,
    }
    facts |= {"top": [asdict(share) for share in controller.top], "samples": None if samples is None else list(samples)}
    facts |= {"left_out": [list(pair) for pair in left_out]} if left_out else {}
    events = []
    if record.reason:
        events.append(Event(record.step, record.action if record.action != "apply" else "warning", record.reason, facts))
    elif controller.norm_spike:
        events.append(Event(record.step, "norm_spike", controller.norm_spike, facts))
    if verdict.loss_spike:
        events.append(Event(record.step, "loss_spike", verdict.loss_spike, {**facts, "loss_z": controller.policy.losses.z}))
    for each in controller.rescaled:
        why = f"{each.name}: std {each.std:.6g} over its target {each.target:.6g}, mean {each.mean:.3g}"
        events.append(Event(record.step, "rescale", why, asdict(each)))
    if controller.qk_clip is not None and controller.qk_clip.clipped:
        events.append(_of_qk_clip(record.step, controller.qk_clip))
    if controller.warning:
        events.append(Event(record.step, "warning", controller.warning))
    return events


def _of_qk_clip(step: int, qk_clip: QKClip) -> Event:
    heads = sorted(qk_clip.clipped, key=lambda head: -head.largest)
    worst = heads[0]
    where = f"{worst.largest:.6g} in layers.{worst.layer}, head {worst.head}"
    why = f"{len(heads)} heads had a logit above {qk_clip.threshold:g}, the largest {where}"
    return Event(step, "qk_clip", why, {"heads": [head._asdict() for head in heads[:5]], "count": len(heads)})
