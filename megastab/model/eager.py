"""Compiled code run as written for a while, so that hooks on what is inside it fire."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """While entered, nothing compiled runs."""
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled, and setting the stance would import the compiler
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
