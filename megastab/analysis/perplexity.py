"""Perplexity of a model on windows of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from megastab.analysis.subject import Subject
from megastab.config.errors import UserError

CHUNK_ELEMENTS = 1 << 22  # of logits in fp32 at a time: 16 MiB


def perplexity(subject: Subject, windows_NS: Tensor, batch: int = 1, label: str = "perplexity") -> float:
    """exp of the mean negative log-likelihood of tokens 1 .. S-1 of every window given those before; inf where it exceeds fp64."""
    loss = mean_loss(subject, windows_NS, batch, label)
    return math.exp(loss) if loss < 709.0 else (math.inf if loss == loss else math.nan)


def mean_loss(subject: Subject, windows_NS: Tensor, batch: int = 1, label: str = "loss") -> float:
    """Mean negative log-likelihood in nats. The softmax is in fp32, a chunk of tokens at a time; the sum in fp64."""
    if windows_NS.shape[1] < 2:
        raise UserError(f"windows of {windows_NS.shape[1]} token have nothing to predict; raise --seq-len to 2 or more")
    total = torch.zeros((), dtype=torch.float64, device=subject.device)
    for window_BS in batches(windows_NS, batch, label):
        logits_BSV = subject.logits(window_BS)
        targets_BS = window_BS.to(logits_BSV.device)[:, 1:]
        for logits_SV, targets_S in zip(logits_BSV[:, :-1], targets_BS, strict=True):
            total += _loss_sum(logits_SV, targets_S)
    return float(total) / (windows_NS.shape[0] * (windows_NS.shape[1] - 1))


def _loss_sum(logits_SV: Tensor, targets_S: Tensor) -> Tensor:
    rows = max(1, CHUNK_ELEMENTS // logits_SV.shape[1])
    chunks = zip(logits_SV.split(rows), targets_S.split(rows), strict=True)
    return torch.stack([F.cross_entropy(logits.float(), targets, reduction="none").double().sum() for logits, targets in chunks]).sum()


def batches(windows_NS: Tensor, batch: int, label: str) -> Iterator[Tensor]:
    """Windows ``batch`` at a time, with a progress bar that counts windows."""
    with tqdm(total=windows_NS.shape[0], desc=label, unit="window", leave=False, dynamic_ncols=True) as bar:
        for window_BS in windows_NS.split(batch):
            yield window_BS
            bar.update(window_BS.shape[0])
