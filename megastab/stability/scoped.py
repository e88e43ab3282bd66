"""A clipping rule of its own for every matrix, or for every block: a spike in one of them leaves the gradients of the others alone.

Norms come from one batched reduction (``gradient_norms``) and are equal on every rank, so the decisions are. A step is applied or
skipped as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from megastab.stability.clip_rule import ClipDecision, RuleWithState
from megastab.stability.gradient_norms import block_of
from megastab.stability.rivals import AdaGC

Scope = Literal["layer", "parameter"]


class Scoped:
    """One rule for each of the things named by ``scope``."""

    def __init__(self, make: Callable[[], RuleWithState], scope: Scope, layers: Mapping[str, int | None]):
        self.scope = scope
        self._keys = {name: name if scope == "parameter" else block_of(name, layer) for name, layer in layers.items()}
        self.rules = {key: make() for key in dict.fromkeys(self._keys.values())}
        self._kind = next((type(rule).__name__ for rule in self.rules.values()), "")

    def observe(self, norm: float, norms: Mapping[str, float]) -> tuple[ClipDecision, dict[str, float]]:
        """Decide for the norms of all matrices.

        Args:
            norm: of the whole gradient.
            norms: of every matrix's, by canonical name.

        Returns:
            What it amounts to for the whole gradient (``scale`` is the norm's, ``z`` the largest), and the factor of every matrix that
            has one below 1.
        """
        if not norm * norm < math.inf:
            return ClipDecision(None, 0.0, None, "skip", "the gradient norm is not finite"), {}
        squares = dict.fromkeys(self.rules, 0.0)
        for name, of_matrix in norms.items():
            squares[self._keys[name]] += of_matrix * of_matrix
        decisions = {key: self._ask(key, math.sqrt(square), norm) for key, square in squares.items()}
        if refused := [(key, each) for key, each in decisions.items() if each.action == "skip"]:
            key, decision = refused[0]
            return ClipDecision(None, 0.0, decision.z, "skip", f"{key}: {decision.reason}"), {}
        clipped = {key: each for key, each in decisions.items() if each.scale < 1.0}
        scores = [each.z for each in decisions.values() if each.z is not None]
        z = max(scores) if scores else None
        if not clipped:
            return ClipDecision(None, 1.0, z, "apply"), {}
        after = math.sqrt(sum(decisions[key].scale ** 2 * square for key, square in squares.items()))
        worst = min(clipped, key=lambda key: clipped[key].scale)
        why = clipped[worst].reason  # empty where clipping is the rule's everyday business
        reason = f"{len(clipped)} of {len(decisions)} clipped, most of all {worst}: {why}" if why else ""
        factors = {name: decisions[key].scale for name, key in self._keys.items() if key in clipped}
        return ClipDecision(after, after / norm if norm else 1.0, z, "clip", reason), factors

    def _ask(self, key: str, norm: float, whole: float) -> ClipDecision:
        rule: Any = self.rules[key]
        return rule.observe(norm, whole) if isinstance(rule, AdaGC) else rule.observe(norm)

    def state_dict(self) -> dict[str, Any]:
        """Plain values, by name."""
        return {"rule": f"{self._kind} by {self.scope}", "rules": {key: rule.state_dict() for key, rule in self.rules.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Take a state back; what differs from it, in words, each thing once."""
        if state.get("rule") != self.state_dict()["rule"]:
            raise ValueError(f"this is not the state of {self.state_dict()['rule']}, but of {state.get('rule')!r}")
        saved, changes = state["rules"], dict[str, None]()
        for key, rule in self.rules.items():
            found = rule.load_state_dict(saved[key]) if key in saved else [f"{key} was not there: it starts with a warm-up"]
            changes.update(dict.fromkeys(found))
        return list(changes)
