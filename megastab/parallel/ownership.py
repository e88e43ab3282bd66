"""The only rule for who contributes a parameter to a sum over ranks.

Over (tp x pp) each row of each matrix is counted exactly once: by the first tp rank that holds it, on the stage that owns it (a tied
copy on a later stage counts nowhere). Norms, rescaling, telemetry and checkpoints all ask here.
"""

from __future__ import annotations

from torch import nn

from megastab.parallel.param_info import info_of


def counts_here(parameter: nn.Parameter, tp_rank: int) -> bool:
    """Whether this rank contributes ``parameter`` to sums over (tp x pp)."""
    if getattr(parameter, "ds_pipe_replicated", False):
        return False  # the copy on the first stage counts
    info = info_of(parameter)
    if info is not None:
        return info.is_first_copy
    # A foreign parameter: Megatron's and DeepSpeed's own convention.
    return tp_rank == 0 or bool(getattr(parameter, "tensor_model_parallel", False))
