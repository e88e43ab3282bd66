"""Child side of the figure ``norms``: forward and backward of each norm on one activation, in turn; seconds as a line of JSON.

Usage: ``python -m megastab.report.bench.norms_contestants TOKENS WIDTH ROUNDS fp32|bf16``
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megastab.model.norms import DyT, RMSNorm
from megastab.parallel.grid import ALONE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARMUP = 3

Step = Callable[[], None]


def norm_of(kind: str, width: int, dtype: torch.dtype) -> nn.Module:
    """One contestant, gains at 1."""
    norm: nn.Module = DyT("norm", width, 0.5, ALONE, None) if kind == "dyt" else RMSNorm("norm", width, 1e-5, ALONE, None)
    for name, parameter in norm.named_parameters():
        nn.init.constant_(parameter, {"alpha": 0.5, "bias": 0.0}.get(name, 1.0))
    return norm.to(dtype)


def step_of(norm: nn.Module, x: Tensor, dy: Tensor) -> Step:
    """Forward and backward, gradients of input and parameters included."""

    def step() -> None:
        x.grad = None
        norm.zero_grad(set_to_none=True)
        norm(x).backward(dy)

    return step


def contestants(tokens: int, width: int, dtype: torch.dtype) -> dict[str, Step]:
    """``rmsnorm eager``, ``dyt eager`` and both compiled, the latter where torch can compile."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(tokens, width, generator=generator).to(dtype) for _ in range(2))
    steps: dict[str, Step] = {}
    for kind in ("rmsnorm", "dyt"):
        steps[f"{kind} eager"] = step_of(norm_of(kind, width, dtype), x.clone().requires_grad_(), dy)
    for kind in ("rmsnorm", "dyt"):
        step = step_of(torch.compile(norm_of(kind, width, dtype)), x.clone().requires_grad_(), dy)  # type: ignore[arg-type]
        try:
            step()
        except Exception as error:
            print(f"torch.compile of {kind}: {error}", file=sys.stderr)
            return {name: step for name, step in steps.items() if name.endswith("eager")}
        steps[f"{kind} compiled"] = step
    return steps


def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds by contestant, round by round (A B C D A B C D ...)."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for taken in range(WARMUP + rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if taken >= WARMUP:
                seconds[name].append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    given_tokens, given_width, given_rounds = map(int, sys.argv[1:4])
    print(json.dumps(measure(contestants(given_tokens, given_width, DTYPES[sys.argv[4]]), given_rounds)))
