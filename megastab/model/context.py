"""What a layer must know about the micro-batch besides the activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megastab.parallel.grid import Axis, TensorParallel


@dataclass(frozen=True)
class Context:
    """The micro-batch's shape and side inputs. The residual stream itself is flat: token t is position t % S of sample t // S, counted
    from ``first_position``."""

    batch: int
    seq: int
    """S, positions of each sample on this rank."""
    sample_ids: Tensor | None = None
    """[B] int64, the key of dropout; needed only with dropout."""
    document_ids: Tensor | None = None
    """[B, S] int32, of the whole sequence where ranks share it; attention stays within equal ids. Needed only with
    ``data.document_mask``."""
    first_position: int = 0
    """Position of the first token: not 0 where ranks share a sequence, and where sampling continues from a cache."""
    cp: Axis = Axis()
    """The ranks that share each sequence."""

    @classmethod
    def of_share(cls, cp: Axis, batch: int, seq: int, sample_ids: Tensor | None = None, document_ids: Tensor | None = None) -> Context:
        """Of samples of ``cp.size * seq`` positions, of which this rank has its ``seq``."""
        return cls(batch, seq, sample_ids, document_ids, cp.rank * seq, cp)

    def local_tokens(self, tp: TensorParallel, device: torch.device) -> Tensor:
        """[T] flat indices of the tokens on this rank's residual stream."""
        total = self.batch * self.seq
        if not tp.sequence:
            return torch.arange(total, device=device)
        share = total // tp.size
        return torch.arange(tp.rank * share, (tp.rank + 1) * share, device=device)
