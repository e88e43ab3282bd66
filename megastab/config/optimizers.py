"""The optimizers ``optimizer.type`` may name, and the parameters each takes."""

from __future__ import annotations

from typing import Any

from megastab.config.nearest import did_you_mean
from megastab.config.settings import read

# Canonical name (torch.optim's, or OrthoAdam) -> parameters, a subset of the class's signature: what is left out either has no meaning
# here (fused, foreach: chosen by the device) or adds a state DeepSpeed's checkpoint tools do not know (amsgrad).
OPTIMIZER_PARAMS: dict[str, tuple[str, ...]] = {
    "AdamW": ("lr", "betas", "eps", "weight_decay"),
    "Adam": ("lr", "betas", "eps", "weight_decay"),
    "SGD": ("lr", "momentum", "weight_decay", "nesterov"),
    "OrthoAdam": ("lr", "betas", "eps", "weight_decay", "rotation", "axes", "seed", "haar_per", "max_axis", "rotate_vectors"),
}
_CHOICES = {"rotation": ("hadamard", "haar", "none"), "axes": ("last", "both"), "haar_per": ("width", "parameter")}


def canonical_type(name: str) -> str | None:
    """The class's own spelling of ``name``, whatever its case; None for an optimizer we do not build."""
    return {known.lower(): known for known in OPTIMIZER_PARAMS}.get(name.lower())


def wrong_optimizer(deepspeed: dict[str, Any]) -> list[str]:
    """One sentence for everything that is wrong with the ``optimizer`` section."""
    name, params = read(deepspeed, "optimizer.type"), read(deepspeed, "optimizer.params", {})
    allowed = ", ".join(OPTIMIZER_PARAMS)
    if name is None:
        return [f"optimizer.type is missing: one of {allowed}."]
    kind = canonical_type(str(name))
    if kind is None:
        return [f"optimizer.type = {name!r} is not one of {allowed}.{did_you_mean(str(name), {k.lower(): k for k in OPTIMIZER_PARAMS})}"]
    if not isinstance(params, dict):
        return [f"optimizer.params = {params!r} must be a section: {{...}}."]
    problems = [_unknown(kind, key) for key in params if key not in OPTIMIZER_PARAMS[kind]]
    if params.get("lr") is None:
        problems.append("optimizer.params.lr is missing: the peak learning rate.")
    return problems + [text for key, value in params.items() if (text := _wrong_value(key, value, params))]


def _unknown(kind: str, key: str) -> str:
    if key == "max_grad_norm":
        return "optimizer.params.max_grad_norm is refused by DeepSpeed: use gradient_clipping at the top level."
    known = OPTIMIZER_PARAMS[kind]
    return (
        f"optimizer.params.{key} is not a parameter of {kind} ({', '.join(known)}).{did_you_mean(key, known, prefix='optimizer.params.')}"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _wrong_value(key: str, value: Any, params: dict[str, Any]) -> str | None:
    said = f"optimizer.params.{key} = {value!r}"
    if key in ("lr", "eps", "weight_decay") and value is not None and not (_is_number(value) and value >= 0):
        return f"{said} must be a number from 0."
    if key == "momentum" and not (_is_number(value) and 0 <= value < 1):
        return f"{said} must be a number in [0, 1)."
    if key == "betas":
        is_pair = isinstance(value, (list, tuple)) and len(value) == 2
        if not is_pair or not all(_is_number(beta) and 0 <= beta < 1 for beta in value):
            return f"{said} must be two numbers in [0, 1), e.g. [0.9, 0.95]."
    if key in ("nesterov", "rotate_vectors") and not isinstance(value, bool):
        return f"{said} must be true or false."
    if key in _CHOICES and value not in _CHOICES[key]:
        return f"{said} must be one of {', '.join(_CHOICES[key])}."
    if key in ("seed", "max_axis") and (not isinstance(value, int) or isinstance(value, bool) or value < (2 if key == "max_axis" else 0)):
        return f"{said} must be a whole number from {2 if key == 'max_axis' else 0}."
    if key == "nesterov" and value and not params.get("momentum"):
        return f"{said} needs optimizer.params.momentum above 0."
    return None
