"""Which code steps OrthoAdam's rows is decided once in a process; no test inherits it from another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def undecided_rows() -> Iterator[None]:
    from megastab.optim import row_op

    row_op.forget()
    yield
    row_op.forget()
