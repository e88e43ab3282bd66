"""One update of OrthoAdam on views of weights, gradient and moments, in place.

    r = Q g;  m = b1 m + (1 - b1) r;  v = b2 v + (1 - b2) r^2;  u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    p = (1 - lr wd) p - lr Q^T u

An element's bits must not depend on where a partition begins. Every operation here gives an element the same bits wherever it lies in
a tensor (a test holds torch to it); torch's own fused AdamW does not.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megastab.optim import row_op
from megastab.optim.rotation import Rotation

CHUNK = 1 << 16  # elements of a plain update at a time: no temporary grows with the matrix


@dataclass(frozen=True)
class Pace:
    """The numbers of one step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    step: int
    """From 1."""
    decay: float = 0.0

    @property
    def correction1(self) -> float:
        """1 - b1^t."""
        return 1 - self.beta1**self.step

    @property
    def root_correction2(self) -> float:
        """sqrt(1 - b2^t)."""
        return math.sqrt(1 - self.beta2**self.step)


@dataclass(frozen=True)
class Views:
    """The same elements of weights, gradient and moments."""

    weights: Tensor
    gradient: Tensor
    mean: Tensor
    square: Tensor

    def rows(self, offset: int, count: int, width: int) -> Views:
        """Of flat tensors: ``count`` rows that begin at element ``offset``."""
        tensors = (self.weights, self.gradient, self.mean, self.square)
        return Views(*(t[offset : offset + count * width].view(count, width) for t in tensors))

    def part(self, here: slice) -> Views:
        """A range along dim 0."""
        return Views(self.weights[here], self.gradient[here], self.mean[here], self.square[here])


def step_rows(views: Views, rotation: Rotation, first_row: int, pace: Pace) -> None:
    """Whole rows [n, D], the first of which is row ``first_row`` of its matrix."""
    if row_op.takes(rotation, views.weights):
        betas, rows = (pace.beta1, pace.beta2), (views.weights, views.gradient, views.mean, views.square)
        row_op.step(rows, rotation, betas, pace.eps, pace.step, pace.lr, pace.decay)
        return
    space = _space(rotation.block_rows, rotation.width, views.gradient.device)
    for here, slot in rotation.pieces(first_row, views.gradient.shape[0]):
        at = views.part(here)
        update = adam(rotation.forward(at.gradient, slot, space), at.mean, at.square, pace, space[2, : at.gradient.shape[0]])
        apply(at.weights, rotation.inverse(update, slot, space), pace)


def step_plain(views: Views, pace: Pace) -> None:
    """Elements that are not rotated, 1-D."""
    space = _space(1, CHUNK, views.gradient.device)[0, 0]
    for first in range(0, views.gradient.numel(), CHUNK):
        at = views.part(slice(first, first + CHUNK))
        apply(at.weights, adam(at.gradient, at.mean, at.square, pace, space[: at.gradient.numel()]), pace)


def step_both(views: Views, left: Rotation | None, right: Rotation | None, pace: Pace) -> None:
    """A whole matrix, its columns rotated by ``left`` and its rows by ``right``; None leaves an axis as it is."""
    apply(views.weights, turned_update(views.gradient, views.mean, views.square, left, right, pace), pace)


def turned_update(gradient: Tensor, mean: Tensor, square: Tensor, left: Rotation | None, right: Rotation | None, pace: Pace) -> Tensor:
    """Move the moments of a whole matrix on; return what :func:`adam` does, turned back."""
    return _both(adam(_both(gradient, left, right, is_inverse=False), mean, square, pace), left, right, is_inverse=True)


def _both(matrix: Tensor, left: Rotation | None, right: Rotation | None, is_inverse: bool) -> Tensor:
    out = torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device)
    if left is not None:
        _turn_rows(matrix.t(), out.t(), left, is_inverse)
    if right is not None:
        _turn_rows(matrix if left is None else out, out, right, is_inverse)
    return out if left is not None or right is not None else matrix


def _turn_rows(rows: Tensor, out: Tensor, rotation: Rotation, is_inverse: bool) -> None:
    turn, space = rotation.inverse if is_inverse else rotation.forward, _space(rotation.block_rows, rotation.width, rows.device)
    for here, slot in rotation.pieces(0, rows.shape[0]):
        out[here] = turn(rows[here], slot, space)


@functools.lru_cache(maxsize=16)
def _space(rows: int, width: int, device: torch.device) -> Tensor:
    """Kept from step to step, one for each width: the allocator would take it from the system and give it back at every block."""
    return torch.empty(3, rows, width, dtype=torch.float32, device=device)


def adam(gradient: Tensor, mean: Tensor, square: Tensor, pace: Pace, out: Tensor | None = None) -> Tensor:
    """Move the moments on; return m / (sqrt(v) + eps sqrt(1 - b2^t)), in ``out`` if given: the update but for the pace's factor."""
    mean.lerp_(gradient, 1 - pace.beta1)
    square.mul_(pace.beta2).addcmul_(gradient, gradient, value=1 - pace.beta2)
    root = torch.sqrt(square, out=out).add_(pace.eps * pace.root_correction2)
    return torch.div(mean, root, out=root)


def apply(weights: Tensor, update: Tensor, pace: Pace) -> None:
    """Decay the weights and subtract the update: a factor of all elements costs no pass of its own here."""
    if pace.decay:
        weights.mul_(1 - pace.lr * pace.decay)
    weights.add_(update, alpha=-pace.lr * pace.root_correction2 / pace.correction1)
