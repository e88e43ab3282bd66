"""Child side of the figure ``attention``: forward and backward of each form, every time right after plain causal SDPA.

Usage: ``python -m megastab.report.bench.attention_contestants DTYPE BATCH ROUNDS NAME ...``; seconds as a line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.nn import functional as F

from megastab.model.flash import Extras, attend_with_bias, attend_with_logit, portable_with_bias, portable_with_logit
from megastab.model.kernels import Mask

HEADS, SEQ, WIDTH = 8, 512, 64
WARMUP = 2
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

Form = Callable[[], Tensor]


class Inputs:
    """Queries, keys and values as a model hands them over, and what each sink adds; all of them want gradients."""

    def __init__(self, dtype: torch.dtype, batch: int):
        torch.manual_seed(0)
        device = get_accelerator().current_device_name()

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=dtype, device=device)

        self.q, self.k, self.v = (draw(batch, SEQ, HEADS, WIDTH).transpose(1, 2).requires_grad_() for _ in "qkv")
        self.logit = draw(HEADS).requires_grad_()
        self.key, self.value = (draw(HEADS, WIDTH).requires_grad_() for _ in "kv")
        self.upstream = draw(batch, SEQ, HEADS, WIDTH).transpose(1, 2)

    def forms(self) -> dict[str, Form]:
        """By the names of the table."""
        qkv, bias, mask = (self.q, self.k, self.v), (self.key, self.value), Mask()
        return {
            "plain": lambda: F.scaled_dot_product_attention(*qkv, is_causal=True),
            "softmax1": lambda: attend_with_logit(*qkv, mask),
            "learned": lambda: attend_with_logit(*qkv, mask, self.logit),
            "kv_bias": lambda: attend_with_bias(*qkv, mask, bias),
            "kv_bias compiled": torch.compile(lambda: attend_with_bias(*qkv, mask, bias)),
            "portable softmax1": lambda: portable_with_logit(*qkv, mask),
            "portable learned": lambda: portable_with_logit(*qkv, mask, self.logit),
            "portable kv_bias": lambda: portable_with_bias(*qkv, mask, bias),
            "capped": lambda: attend_with_logit(*qkv, mask, extras=Extras(cap=50.0)),
        }

    def seconds(self, form: Form) -> float:
        """One forward and backward."""
        for tensor in (self.q, self.k, self.v, self.logit, self.key, self.value):
            tensor.grad = None
        get_accelerator().synchronize()
        began = time.perf_counter()
        form().backward(self.upstream)
        get_accelerator().synchronize()
        return time.perf_counter() - began


def measure(dtype: str, batch: int, rounds: int, names: Sequence[str]) -> dict[str, list[list[float]]]:
    """By contestant, round by round: seconds of plain attention and of the contestant just after it."""
    inputs = Inputs(DTYPES[dtype], batch)
    forms = inputs.forms()
    taken: dict[str, list[list[float]]] = {who: [] for who in names}
    for count in range(WARMUP + rounds):
        for who in names:
            pair = [inputs.seconds(forms["plain"]), inputs.seconds(forms[who])]
            if count >= WARMUP:
                taken[who].append(pair)
    return taken


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])))
