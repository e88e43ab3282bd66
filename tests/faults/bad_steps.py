"""Rank 1 puts out NaN in the second block's MLP at chosen steps."""

import os
from collections.abc import Collection
from typing import Any


def plant(steps: Collection[int]) -> None:
    """On a rank, before anything is built."""
    from megastab.engine.trainer import Trainer
    from megastab.model.mlp import MLP

    take_step, forward = Trainer.take_step, MLP.forward
    now = {"is_bad": False}

    def bad_step(self: Trainer) -> Any:
        now["is_bad"] = self.step + 1 in steps and os.environ["RANK"] == "1"
        return take_step(self)

    def bad_forward(self: MLP, *args: Any) -> Any:
        out = forward(self, *args)
        is_second = "layers.1" in next(self.parameters()).megastab_info.name  # type: ignore[attr-defined]
        return out * float("nan") if now["is_bad"] and is_second and self.training else out

    Trainer.take_step, MLP.forward = bad_step, bad_forward  # type: ignore[method-assign]
