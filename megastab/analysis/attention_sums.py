"""Attention weights of every layer and head, summed over windows while they pass: no map outlives its layer's forward pass.

Two answers are kept of each query: its weight on key 0, and whether it is more than any other key's (a tie is no
maximum: a query that attends alike to all is not one that looks at the first).
Query 0 sees key 0 alone; it is left out of the share, where it would count as a hit, and is in the mean weight, whose reference has it
too (ALGORITHMS 3.3: uniform causal attention gives H_T / T).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megastab.analysis.perplexity import batches
from megastab.analysis.subject import Subject
from megastab.config.errors import UserError

CORNER = 48  # positions of the maps that are kept


def uniform_first_mass(seq: int, has_sink: bool = False) -> float:
    """Mean weight on key 0 where every query attends alike to all it sees: H_T / T, and (H_{T+1} - 1) / T with a sink beside the keys."""
    return sum(1.0 / (position + (2 if has_sink else 1)) for position in range(seq)) / seq


class AttentionSums:
    """Sums over windows, fp64 on the CPU. Letters: L layers, Q heads, S positions, C corner of a map."""

    def __init__(self, num_layers: int, heads: int, seq: int, has_sink: bool = False):
        self.seq, self.num_windows, self.has_sink = seq, 0, has_sink
        self.first_mass_LQ, self.first_wins_LQ, self.sink_LQ, self.entropy_LQ = torch.zeros(4, num_layers, heads, dtype=torch.float64)
        self.columns_LQS = torch.zeros(num_layers, heads, seq, dtype=torch.float64)
        corner = min(seq, CORNER)
        self.corner_LQCC = torch.zeros(num_layers, heads, corner, corner, dtype=torch.float64)

    def see(self, layer: int, maps_BQSS: Tensor) -> None:
        """One layer of one forward pass."""
        if layer == 0:
            self.num_windows += maps_BQSS.shape[0]
        for maps_QSS in maps_BQSS:
            if not maps_QSS.isfinite().all():
                raise UserError(f"attention weights of layer {layer} are not finite: use --dtype fp32")
            self._add(layer, maps_QSS)

    def _add(self, layer: int, maps_QSS: Tensor) -> None:
        first_QS, rows_QS = maps_QSS[..., 0], maps_QSS.sum(-1)
        self.first_mass_LQ[layer] += first_QS.double().mean(-1).cpu()
        self.first_wins_LQ[layer] += (first_QS > maps_QSS[..., 1:].amax(-1))[:, 1:].double().mean(-1).cpu()
        self.sink_LQ[layer] += (1.0 - rows_QS.double()).clamp_min(0.0).mean(-1).cpu()
        seen_S = torch.arange(1, self.seq + 1, device=maps_QSS.device)
        entropy_QS = -torch.special.xlogy(maps_QSS, maps_QSS).sum(-1)
        self.entropy_LQ[layer] += (entropy_QS[:, 1:] / seen_S[1:].log()).double().mean(-1).cpu()
        self.columns_LQS[layer] += maps_QSS.sum(1).double().cpu() / self.seq
        corner = self.corner_LQCC.shape[-1]
        self.corner_LQCC[layer] += maps_QSS[:, :corner, :corner].double().cpu()

    def means(self) -> AttentionSums:
        """Divided by the number of windows, in place."""
        sums = (self.first_mass_LQ, self.first_wins_LQ, self.sink_LQ, self.entropy_LQ, self.columns_LQS, self.corner_LQCC)
        for total in sums:
            total /= self.num_windows
        return self


def attention_means(subject: Subject, windows_NS: Tensor, batch: int = 1, label: str = "attention") -> AttentionSums:
    """Means over windows of what attention does in every layer and head."""
    if windows_NS.shape[1] < 2:
        raise UserError("windows of one token have nothing to attend to; raise --seq-len to 2 or more")
    sums = AttentionSums(len(subject.blocks), subject.heads, windows_NS.shape[1], subject.has_sink)
    with subject.watch_maps(sums.see):
        for window_BS in batches(windows_NS, batch, label):
            subject.run(window_BS)
    return sums.means()
