"""A training run whose rank 1 puts out NaN in the second block's MLP at the steps named in BAD_STEPS."""

import os
import sys
from typing import Any

BAD_STEPS = {int(step) for step in os.environ["BAD_STEPS"].split(",")}


def plant() -> None:
    from megastab.engine.trainer import Trainer
    from megastab.model.mlp import MLP

    take_step, forward = Trainer.take_step, MLP.forward
    now = {"is_bad": False}

    def bad_step(self: Trainer) -> Any:
        now["is_bad"] = self.step + 1 in BAD_STEPS and os.environ["RANK"] == "1"
        return take_step(self)

    def bad_forward(self: MLP, *args: Any) -> Any:
        out = forward(self, *args)
        is_second = "layers.1" in next(self.parameters()).megastab_info.name  # type: ignore[attr-defined]
        return out * float("nan") if now["is_bad"] and is_second and self.training else out

    Trainer.take_step, MLP.forward = bad_step, bad_forward  # type: ignore[method-assign]


if __name__ == "__main__":
    from megastab.pretrain import main

    plant()
    sys.exit(main())
