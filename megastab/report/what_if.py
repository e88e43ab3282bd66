"""What another clipping rule would have decided about a past run's norms: ``python tools/report.py RUN --what-if '{"zclip": {}}'``.

The norms are those of the run as it was. A rule that had clipped a step would have changed the steps after it, so this tells how often
and where a rule acts, not what the loss would have been.
"""

from __future__ import annotations

import json
import math
import warnings

from pydantic import ValidationError

from megastab.config.errors import UserError
from megastab.config.schema_stability import StabilityConfig
from megastab.config.section import Section
from megastab.report.history import History
from megastab.stability.choice import clipping_rule
from megastab.stability.clip_rule import ClipDecision
from megastab.stability.fixed_clip import capped
from megastab.stability.rivals import SkipStep
from megastab.stability.scoped import Scoped

SHOWN = 10  # steps named


class Question(Section):
    """A stability section and the cap beside it."""

    stability: StabilityConfig
    gradient_clipping: float = 0.0


def question(text: str) -> Question:
    """From the command line: a stability section as JSON, with ``gradient_clipping`` beside its keys where there is a cap."""
    try:
        given = json.loads(text)
        cap = given.pop("gradient_clipping", 0.0)
        return Question.model_validate({"stability": given, "gradient_clipping": cap})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--what-if {text}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"--what-if {text}: not a JSON object ({error}); write for example '{{\"zclip\": {{}}}}'") from error


def decisions(history: History, asked: Question) -> list[ClipDecision]:
    """The rule's decision for every step of the run, in order."""
    cap = asked.gradient_clipping
    rule = clipping_rule(asked.stability, cap, batch_size=1, layers={})
    if isinstance(rule, Scoped):
        raise UserError("--what-if: a rule by layer or matrix needs their norms, and a run logs the global one: use scope global")
    decided = []
    is_blind_to_cap = asked.stability.clipping in ("autoclip", "skip_step")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a cap that leaves a rule nothing to do shows in the answer
        for record, norm, loss in zip(history.steps, history.column("grad_norm"), history.column("loss"), strict=True):
            if str(record.get("reason")).startswith("overflow"):  # the fp16 loss scale's business, which no rule is told of
                decided.append(ClipDecision(None, 0.0, None, "skip", "overflow"))
                continue
            seen = norm if math.isfinite(norm) else math.inf
            decision = rule.observe(seen, loss) if isinstance(rule, SkipStep) else rule.observe(seen)
            decided.append(capped(decision, seen, cap) if is_blind_to_cap else decision)
    return decided


def answer(history: History, asked: Question) -> str:
    """The decisions in a few lines, beside what the run did."""
    decided, steps = decisions(history, asked), [int(step) for step in history.column("step")]
    name = asked.stability.clipping or f"gradient_clipping {asked.gradient_clipping:g}"
    lines = [f"{name} on these {len(steps)} norms:"]
    for action, verb in (("clip", "clipped"), ("skip", "skipped")):
        at = [(step, decision) for step, decision in zip(steps, decided, strict=True) if decision.action == action]
        did = len(history.steps_where(action))
        lines.append(f"  {verb} {len(at)} ({100 * len(at) / len(steps):.1f} %); the run {verb} {did}")
        hardest = sorted(at, key=lambda item: item[1].scale)[:SHOWN]
        told = ", ".join(f"{step} (x{d.scale:.3g})" if action == "clip" else f"{step}" for step, d in sorted(hardest))
        lines += [f"    hardest: {told}"] if told else []
    return "\n".join(lines)
