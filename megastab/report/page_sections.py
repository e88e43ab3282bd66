"""The page's other sections: what ran, spike scores, rescales, turns of the run, evaluations, speed."""

from __future__ import annotations

import math
from collections import Counter
from statistics import median
from typing import Any

from megastab.report.history import History
from megastab.report.incidents import Incident
from megastab.report.markup import bullets, counted, facts, figure, note, section, table, text
from megastab.report.rescales import rescaled_matrices
from megastab.report.spike_score import MIN_PREVIOUS, fitted_window, spike_score
from megastab.report.what_ran import what_ran

SHOWN_MATRICES = 15
SHOWN_EVENTS = 40
SHOWN_EVALUATIONS = 20
OWN_PLACE = ("clip", "skip", "loss_spike", "rescale", "save")  # told in the table, the rescales, or by number


def ran(config: dict[str, Any]) -> str:
    """The config in words."""
    rows = [(text(name), text(words)) for name, words in what_ran(config)]
    return section("What ran", facts(rows) if rows else note("The run folder has no readable config.json."))


def scores(history: History, incidents: list[Incident]) -> str:
    """The spike scores of loss and norm."""
    overflows = {incident.step for incident in incidents if incident.is_overflow}  # the loss scaler's business, no spike
    rows = []
    for name, key in (("loss", "loss"), ("gradient norm", "grad_norm")):
        steps, values = history.column("step"), history.column(key)
        kept = [value for step, value in zip(steps, values, strict=True) if step not in overflows]
        window = fitted_window(sum(map(math.isfinite, kept)))
        score = spike_score(kept)
        said = f"needs more than {MIN_PREVIOUS} values" if math.isnan(score) else f"{score:.3g} %"
        rows.append([name, said, "&ndash;" if math.isnan(score) else str(window)])
    meaning = (
        "Percentage of values at least 7 standard deviations above the mean of the <i>window</i> values before them (OLMo 2; its window "
        "is 1000, here half the run, at least 100, where that is shorter). A value that was not finite counts as a spike. "
        "In a short run the window still holds the first fall of the loss, which widens the deviation and hides spikes of the loss."
    )
    return section("Spike score", table(("of", "score", "window"), rows, numbers=("score", "window")), note(meaning))


def rescales(history: History) -> str:
    """The matrices that were rescaled, the most often first."""
    found = rescaled_matrices(history)
    if not found:
        return ""
    shown = found[:SHOWN_MATRICES]
    rows = [[text(m.name), str(m.times), f"{m.first_step} to {m.last_step}", figure(m.smallest_factor)] for m in shown]
    total = sum(matrix.times for matrix in found)
    hardest = min((m for m in found if not math.isnan(m.smallest_factor)), key=lambda m: m.smallest_factor, default=None)
    words = f"{counted(total, 'rescale')} of {counted(len(found), 'matrix', 'matrices')}"
    words += f"; the smallest factor was {figure(hardest.smallest_factor)}, for {text(hardest.name)}." if hardest else "."
    more = note(f"and {len(found) - len(shown)} more, rescaled no more often.") if len(found) > len(shown) else ""
    head = ("matrix", "times", "steps", "smallest factor")
    return section("Rescales", f"<p>{words}</p>", table(head, rows, numbers=("times", "smallest factor")), more)


def turns(history: History, incidents: list[Incident]) -> str:
    """Resumes, rewinds, warnings, changed settings, in order; saves only by number."""
    in_table = {incident.step for incident in incidents}
    told = [e for e in history.events if e.get("kind") not in OWN_PLACE and not (e.get("kind") == "replay" and e["step"] in in_table)]
    lines = [f"step {event['step']}: <b>{text(event.get('kind', '?'))}</b> {text(event.get('reason') or '')}" for event in told]
    more = note(f"and {len(lines) - SHOWN_EVENTS} more: see events.jsonl.") if len(lines) > SHOWN_EVENTS else ""
    saves = [event["step"] for event in history.events_of("save")]
    saved = note(f"{counted(len(saves), 'checkpoint')} written, the last at step {saves[-1]}.") if saves else ""
    return section("Along the way", bullets(lines[:SHOWN_EVENTS]), more, saved, _taken_back(history))


def _taken_back(history: History) -> str:
    """What had happened in steps that were taken again since, by kind."""
    kinds = Counter(str(event.get("kind")) for event in history.undone)
    if not kinds:
        return ""
    told = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in kinds.most_common())
    return note(f"Of steps that were taken back and taken again: {text(told)} (marked undone in events.jsonl).")


def evaluations(history: History) -> str:
    """The validation losses, the lowest marked; of a long run the first, the lowest and evenly many between."""
    records = history.evaluations
    if not records:
        return ""
    steps, losses = history.evaluated("valid_loss")
    _, bits = history.evaluated("valid_bits_per_byte")
    finite = [i for i, loss in enumerate(losses) if math.isfinite(loss)]
    lowest = min(finite, key=lambda i: losses[i], default=-1)
    every = -(-len(records) // SHOWN_EVALUATIONS)
    shown = [i for i in range(len(records)) if i in (lowest, len(records) - 1) or i % every == 0]
    rows = []
    for i in shown:
        loss = f"<b>{figure(losses[i])}</b> lowest" if i == lowest else figure(losses[i], "not finite")
        rows.append([f"{steps[i]:.0f}", loss, figure(math.exp(min(losses[i], 50.0))), figure(bits[i])])
    head = ("step", "valid loss [nats/token]", "perplexity", "bits/byte")
    more = note(f"{len(shown)} of {len(records)} evaluations.") if len(shown) < len(records) else ""
    return section("Evaluations", table(head, rows, numbers=head), more)


def speed(history: History) -> str:
    """One line: tokens, time, FLOP/s, memory."""
    rate, seconds = _finite(history, "tokens_per_second"), _finite(history, "seconds")
    flops, mfu, memory, data = (_finite(history, key) for key in ("model_tflops", "mfu", "memory_gb", "data_seconds"))
    words = [f"{median(rate) / 1e3:.4g}k tokens/s"] if rate else []
    words += [f"{median(seconds):.3g} s a step (slowest {max(seconds):.3g} s)"] if seconds else []
    words += [f"{median(flops):.3g} TFLOP/s a rank"] if flops else []
    words += [f"MFU {100 * median(mfu):.3g} %"] if mfu else []
    words += [f"{100 * sum(data) / sum(seconds):.2g} % of the time fetching data"] if data and sum(seconds) > 0 else []
    words += [f"peak memory {max(memory):.3g} GB"] if memory else []
    return section("Speed", f"<p>{', '.join(words)} (medians over the steps).</p>" if words else "")


def _finite(history: History, key: str) -> list[float]:
    return list(filter(math.isfinite, history.column(key)))
