"""The page's answer to "what happened": one sentence, and the worst steps in a table."""

from __future__ import annotations

import math
from collections import Counter

from megastab.report.history import History
from megastab.report.incidents import LOOKED_AHEAD_STEPS, LOOKED_BACK_STEPS, REACTED_SIGMAS, Incident
from megastab.report.markup import counted, figure, note, section, share_bar, table, text

SHOWN = 25
WORDS = {"skip": "skipped", "loss_spike": "loss spike", "norm_spike": "norm spike", "clip": "clipped"}
HEAD = ("step", "what", "norm", "z", "threshold", "what was done", "who carried it", "samples", "loss before &rarr; at &rarr; after")
READ = (
    "Worst first: steps that were not finite, skipped steps, then by how far norm or loss stood out, in standard "
    "deviations. <b>z</b> is how many deviations the norm lay above its recent mean; <b>threshold</b> is the norm the "
    "gradients were clipped to, or would have been; <b>who carried it</b> is each parameter's share of the squared norm: one parameter "
    "with most of it points at a layer, an even spread at the batch, whose sample ids are there to be looked up. The loss of a step is "
    "taken before its update, so an update that did harm shows one step later: it <b>rose</b> when the highest loss of the step and "
    f"the {LOOKED_AHEAD_STEPS} after it is {REACTED_SIGMAS:g} robust deviations (sd) above the median of the {LOOKED_BACK_STEPS} before."
)


def what_happened(history: History, incidents: list[Incident]) -> str:
    """The section."""
    shown = incidents[:SHOWN]
    rows = [_row(incident) for incident in shown]
    parts = [f"<p>{sentence(history, incidents)}</p>"]
    if rows:
        parts += [_leader(incidents), table(HEAD, rows, numbers=("step", "norm", "z", "threshold"))]
        more = len(incidents) - len(shown)
        parts += [note(f"and {more} more, each less bad than these: see events.jsonl and metrics.jsonl.")] if more else []
        parts.append(note(READ))
    return section("What happened", *parts)


def sentence(history: History, incidents: list[Incident]) -> str:
    """All of it counted, or that there was nothing to count."""
    overflows = sum(i.is_overflow for i in incidents)
    skips = sum(i.action == "skip" for i in incidents) - overflows
    clips = sum("clip" in i.kinds for i in incidents)
    said = [
        counted(sum(not i.is_finite and not i.is_overflow for i in incidents), "step was not finite", "steps were not finite"),
        counted(skips, "step was skipped", "steps were skipped"),
        counted(overflows, "step was skipped while the fp16 loss scale fell", "steps were skipped while the fp16 loss scale fell"),
        counted(sum("loss_spike" in i.kinds for i in incidents), "loss spike"),
        counted(sum("norm_spike" in i.kinds for i in incidents), "norm spike"),
        counted(clips, "step stood out and was clipped", "steps stood out and were clipped") + f" ({_percent(clips, history)})",
        counted(len(history.events_of("rescale")), "rescale of a matrix", "rescales of matrices"),
        counted(len(history.events_of("rewind")), "rewind"),
        counted(len(history.events_of("warning")), "warning"),
    ]
    said = [words for words in said if not words.startswith("0 ")]
    routine = len(history.steps_where("clip")) - sum(i.action == "clip" for i in incidents)
    cap = f" The fixed cap scaled the gradients of {counted(routine, 'step')} ({_percent(routine, history)})." if routine > 0 else ""
    if not said:
        return f"Nothing happened: every step was applied, and no spike, rescale, rewind or warning was logged.{cap}"
    return f"Of {counted(len(history.steps), 'step')}: {', '.join(said)}.{cap}"


def _percent(count: int, history: History) -> str:
    return f"{100 * count / len(history.steps):.3g} % of them"


def _leader(incidents: list[Incident]) -> str:
    """Whether it was the same parameter each time."""
    leaders = Counter(incident.top[0][0] for incident in incidents if incident.top)
    if leaders.total() < 2:
        return ""
    name, times = leaders.most_common(1)[0]
    return (
        f"<p>The largest share was most often that of <b>{text(name)}</b>: {times} of {leaders.total()} steps whose shares are known.</p>"
    )


def _row(incident: Incident) -> list[str]:
    missing = "&ndash;" if incident.is_finite else _bad("not finite")
    return [
        str(incident.step),
        f"{_what(incident)}{''.join(f'<small>{text(reason)}</small>' for reason in incident.reasons if reason)}",
        figure(incident.norm, missing),
        figure(incident.z),
        figure(incident.threshold),
        _done(incident),
        "".join(share_bar(name, share) for name, share in incident.top) or "&ndash;",
        _samples(incident),
        f'<span class="line">{" &rarr; ".join(map(_loss, incident.losses))}</span><small>{_reaction(incident)}</small>',
    ]


def _samples(incident: Incident) -> str:
    if incident.samples is None:
        return "&ndash;"
    without = ", ".join(f"{first} to {last}" for first, last in incident.left_out)
    span = f'<span class="line">{incident.samples[0]} to {incident.samples[1]}</span>'
    return span + (f"<small>without {without}</small>" if without else "")


def _bad(words: str) -> str:
    return f'<span class="bad">{words}</span>'


def _what(incident: Incident) -> str:
    words = [WORDS[kind] for kind in incident.kinds if kind in WORDS]
    if not incident.is_finite:
        words.insert(0, "not finite")
    is_bad = not incident.is_overflow and (incident.action == "skip" or not incident.is_finite)
    return f'<span class="{"bad" if is_bad else "warn"}">{", ".join(words)}</span>'


def _done(incident: Incident) -> str:
    if incident.action == "skip":
        return "no update: weights, moments and statistics as before"
    if incident.action == "clip":
        left = incident.norm * incident.scale
        return f"gradients times {figure(incident.scale)}" + (f", to a norm of {left:.4g}" if math.isfinite(left) else "")
    return "applied unscaled" if incident.action == "apply" else "&ndash;"


def _loss(value: float | None) -> str:
    return figure(value, "&ndash;" if value is None else _bad("not finite"))


def _reaction(incident: Incident) -> str:
    if incident.rise == math.inf:
        return "not finite here or just after"
    if math.isnan(incident.rise):
        return "too few losses around it to tell"
    rose = f"{incident.rise:.3g} ({incident.rise_sigmas:.0f} sd)"
    return f'<span class="warn">rose by {rose}</span>' if incident.has_reacted else "did not react"
