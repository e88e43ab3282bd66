"""Which settings of ZClip make sense, each refusal with its way out."""

from __future__ import annotations

from typing import Any

from megastab.stability.clip_rule import demand

RELEASED_MODES = {"zscore": '"reciprocal" (clip_option adaptive_scaling) or "mean" (clip_option mean)', "percentile": '"max"'}


def check_settings(settings: dict[str, Any], on_change: str) -> None:
    """Raise a ValueError for what makes no sense."""
    s = settings
    one_of("mode", s["mode"], ("reciprocal", "mean", "max"), RELEASED_MODES)
    one_of("variance", s["variance"], ("paper", "west"))
    one_of("on_change", on_change, ("auto", "keep", "rewarm"))
    demand(0.0 < s["alpha"] < 1.0, "alpha", s, "between 0 and 1")
    demand(s["z_thresh"] > 0.0, "z_thresh", s, "above 0")
    demand(s["warmup_steps"] >= 1, "warmup_steps", s, "at least 1")
    demand(s["max_grad_norm"] is None or s["max_grad_norm"] > 0.0, "max_grad_norm", s, "above 0, or None for no cap")
    demand(s["clip_factor"] > 0.0, "clip_factor", s, 'above 0 (mode "mean" is what 0 would be)')
    demand(s["eps"] >= 0.0, "eps", s, "0 or more")
    demand(s["relative_eps"] > 0.0, "relative_eps", s, "above 0: it keeps z finite when all norms are equal")
    demand(0 <= s["rewarm_clipped"] <= s["rewarm_window"], "rewarm_clipped", s, "from 0 (off) to rewarm_window")
    demand(not s["cap_statistics"] or s["max_grad_norm"] is not None, "cap_statistics", s, "False without a max_grad_norm")
    if s["compat"]:
        demand(s["variance"] == "paper", "variance", s, '"paper" with compat=True: the released package knows no other')
        demand(not s["cap_statistics"], "cap_statistics", s, "False with compat=True: the released package has no such thing")
    else:
        demand(s["clip_factor"] <= 1.0, "clip_factor", s, "at most 1: more would clip spikes to above themselves")


def one_of(name: str, value: str, allowed: tuple[str, ...], hints: dict[str, str] | None = None) -> None:
    """Refuse a word that is not among those allowed."""
    if value not in allowed:
        hint = f"; {value!r} of the released package is {hints[value]} here" if hints and value in hints else ""
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; it is {value!r}{hint}")
