"""Child side of the figure ``orthoadam``: steps of each optimizer on one matrix, in turn; seconds as a line of JSON.

Usage: ``python -m megastab.report.bench.orthoadam_contestants ROWS WIDTH ROUNDS NAME ...``
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from megastab.optim import row_op
from megastab.optim.ortho_adam import OrthoAdam
from megastab.optim.rotation import haar

LEARNING_RATE, BETAS, EPS, DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1
WARMUP = 2

Step = Callable[[], object]


class DenseHaar:
    """What a plain reading of the paper does to a matrix: a dense Q on either side of gradient and update, AdamW in between."""

    def __init__(self, weights: nn.Parameter):
        generator = torch.Generator().manual_seed(0)
        self.weights, self.count = weights, 0
        self.left, self.right = (haar(size, generator) for size in weights.shape)
        self.mean, self.square = torch.zeros_like(weights.data), torch.zeros_like(weights.data)

    @torch.no_grad()
    def step(self) -> None:
        """One update."""
        gradient = self.weights.grad
        assert gradient is not None
        self.count += 1
        rotated = self.left @ gradient @ self.right.t()
        self.mean.lerp_(rotated, 1 - BETAS[0])
        self.square.mul_(BETAS[1]).addcmul_(rotated, rotated, value=1 - BETAS[1])
        root = (self.square / (1 - BETAS[1] ** self.count)).sqrt_().add_(EPS)
        update = self.left.t() @ (self.mean / root) @ self.right
        self.weights.mul_(1 - LEARNING_RATE * DECAY).sub_(update, alpha=LEARNING_RATE / (1 - BETAS[0] ** self.count))


def weights_of(num_rows: int, width: int) -> nn.Parameter:
    """A matrix with a gradient, alike for all."""
    generator = torch.Generator().manual_seed(0)
    weights = nn.Parameter(0.02 * torch.randn(num_rows, width, generator=generator))
    weights.grad = torch.randn(num_rows, width, generator=generator)
    return weights


def step_of(who: str, weights: Tensor) -> Step:
    """One contestant's step."""
    settings = {"lr": LEARNING_RATE, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
    if who == "dense":
        assert isinstance(weights, nn.Parameter)
        return DenseHaar(weights).step
    if who in ("fused", "foreach"):
        return torch.optim.AdamW([weights], **settings, **{who: True}).step  # type: ignore[arg-type]
    step, switch = OrthoAdam([("w", weights)], **settings).step, "1" if who == "op" else "0"  # type: ignore[arg-type]

    def by_this_path() -> None:
        os.environ[row_op.SWITCH] = switch
        step()

    return by_this_path


def measure(num_rows: int, width: int, rounds: int, names: Sequence[str]) -> dict[str, list[float]]:
    """Seconds by contestant, round by round (A B C A B C ...)."""
    row_op.agree()
    steps = {who: step_of(who, weights_of(num_rows, width)) for who in names if who != "op" or row_op.active()}
    seconds: dict[str, list[float]] = {who: [] for who in steps}
    for taken in range(WARMUP + rounds):
        for who, step in steps.items():
            began = time.perf_counter()
            step()
            if taken >= WARMUP:
                seconds[who].append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    given_rows, given_width, given_rounds = map(int, sys.argv[1:4])
    print(json.dumps(measure(given_rows, given_width, given_rounds, sys.argv[4:])))
