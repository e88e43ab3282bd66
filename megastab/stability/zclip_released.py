"""The arithmetic of the released package ``zclip`` 1.0.0, in its order of operations: differences from it are exactly 0.0."""

from __future__ import annotations

DENOMINATOR = 1e-6  # added to the norm in every factor, by the package and by torch.nn.utils.clip_grad_norm_


def released_target(
    norm: float, mean: float, var: float, mode: str, z_thresh: float, eps: float, clip_factor: float
) -> tuple[float, float, float | None]:
    """(z, norm from which on a step is a spike, norm a spike is clipped to or None).

    The package's names: "reciprocal" is zscore with adaptive_scaling, "mean" is zscore with mean, "max" is percentile.
    """
    std = var**0.5
    z = (norm - mean) / (std + eps)
    if mode == "max":
        edge = mean + z_thresh * std
        return z, edge, edge if norm > edge else None
    edge = mean + z_thresh * (std + eps)
    if not z > z_thresh:
        return z, edge, None
    if mode == "mean":
        return z, edge, mean
    return z, edge, (mean + (z_thresh * std) / (z / z_thresh)) * clip_factor


def released_scale(norm: float, limit: float) -> float:
    """The factor after warm-up: 1 at the limit itself."""
    return limit / (norm + DENOMINATOR) if norm > limit else 1.0


def released_warmup_scale(norm: float, cap: float) -> float:
    """The factor during warm-up, torch's own: 0.999999 for a norm at the cap."""
    return min(1.0, cap / (norm + DENOMINATOR))
