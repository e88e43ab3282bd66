"""OrthoAdam's row update as a C++ op: built at first use, kept in a cache, left alone wherever it cannot be had.

``row_step.step_rows`` calls it for ``hadamard`` rows on the CPU. It agrees with the torch path to rounding, not to the bit; so that
every layout gives the same bits, the ranks of a job decide together which of the two runs (:func:`agree`). Until they have, torch does.
No failure here is an error: a line in the log says why, and torch does the work.

``MEGASTAB_ORTHO_OP=0`` turns it off. The cache is ``megastab`` in ``TORCH_EXTENSIONS_DIR``, ``XDG_CACHE_HOME`` or ``~/.cache``.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megastab.optim.rotation import MAX_ODD, Rotation, factors
from megastab.parallel import collectives

log = logging.getLogger("megastab")

SWITCH = "MEGASTAB_ORTHO_OP"
SOURCE = Path(__file__).with_name("row_op.cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-ffp-contract=off")  # sums are fused where the source says so
LIMIT_SECONDS = 300.0  # a build takes about ten; the wait for another process's is part of it
IN_TORCH = "in pure torch"
BUILD = (
    "import sys; from torch.utils.cpp_extension import load; "
    "load('row_op', [sys.argv[1]], build_directory=sys.argv[2], extra_cflags=sys.argv[3:], extra_ldflags=['-fopenmp'], "
    "is_python_module=False)"
)

_is_agreed = False


class _Unavailable(Exception):
    """Why there is no op."""


class Numbers(ctypes.Structure):
    """``Numbers`` of row_op.cpp."""

    _fields_ = [
        (name, ctypes.c_float)
        for name in ("keep1", "take1", "keep2", "take2", "correct1", "correct2", "eps", "decay", "rate", "scale")
    ]  # fmt: skip


def agree(is_of_use: bool = True) -> str:
    """Use the op if every rank of the job has it, and the same (collective over the job).

    Args:
        is_of_use: whether the caller has rows for it; a later agreement about other rows does not revoke an earlier one.

    Returns:
        Which path the caller's rows take, for a line at the start.
    """
    global _is_agreed
    mine = _said() if is_of_use else ""
    every = set(collectives.gather_objects(mine))
    if len(every) > 1:
        log.warning("OrthoAdam steps rows %s: not every rank has the same built op", IN_TORCH)
    if every != {""}:
        _is_agreed = len(every) == 1
    return describe() if is_of_use else IN_TORCH


def forget() -> None:
    """As before :func:`agree`: torch does the work."""
    global _is_agreed
    _is_agreed = False


def active() -> bool:
    """Whether the job's ranks have agreed on the op."""
    return _is_agreed and _is_wanted()


def describe() -> str:
    """Which path the rows take, for a line at the start."""
    return f"by the built C++ op ({_said()})" if active() else IN_TORCH


def takes(rotation: Rotation, weights: Tensor) -> bool:
    """Whether the op does these rows: ``hadamard``, fp32, on the CPU."""
    return _is_agreed and rotation.left is not None and weights.device.type == "cpu" and weights.dtype == torch.float32 and active()


def step(rows: Sequence[Tensor], rotation: Rotation, betas: tuple[float, float], eps: float, count: int, lr: float, decay: float) -> None:
    """One update in place.

    Args:
        rows: weights, gradient, mean and square, each [n, D], contiguous fp32.
        rotation: a ``hadamard`` of width D.
        betas: decay of the moments.
        eps: added to the root.
        count: this step, from 1.
        lr: learning rate.
        decay: decoupled.

    Raises:
        ValueError: rows the op cannot address.
    """
    found, signs, left = library(), rotation.signs, rotation.left
    assert found is not None and signs is not None and left is not None
    shape = (rows[0].shape[0], rotation.width)
    if any(t.shape != shape or not t.is_contiguous() or t.dtype != torch.float32 for t in rows):
        raise ValueError(f"the row op needs contiguous fp32 rows of {rotation.width}, not {[(tuple(t.shape), t.dtype) for t in rows]}")
    odd, power = factors(rotation.width)
    assert odd <= MAX_ODD  # what the op has room for
    block = left.shape[0] // odd
    head = left[::block, ::block].contiguous()  # H's first entry is 1: what is left of Kronecker(A, H) is A
    (first, second), (one, two) = betas, (1 - betas[0] ** count, 1 - betas[1] ** count)
    numbers = Numbers(first, 1 - first, second, 1 - second, 1 / one, two**-0.5, eps, 1 - lr * decay, lr, rotation.scale)
    found.row_op_step(*(t.data_ptr() for t in (*rows, signs, head)), shape[0], power, odd, ctypes.byref(numbers))


def library() -> ctypes.CDLL | None:
    """The built op, or None where it is turned off or cannot be had (said once)."""
    return _load() if _is_wanted() else None


def _is_wanted() -> bool:
    return os.environ.get(SWITCH, "1") != "0"


def _said() -> str:
    found = library()
    return "" if found is None else str(found.row_op_said().decode())


@functools.lru_cache(maxsize=1)
def _load() -> ctypes.CDLL | None:
    try:
        found = ctypes.CDLL(str(built()))
    except Exception as error:  # whatever it is, torch can do the work
        log.warning("OrthoAdam steps rows %s, slower: the C++ op cannot be built here: %s", IN_TORCH, error)
        return None
    found.row_op_said.restype = ctypes.c_char_p
    found.row_op_step.restype = None
    found.row_op_step.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    return found


def cache_dir() -> Path:
    """Where built ops are kept."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME")
    return (Path(chosen) if chosen else Path.home() / ".cache") / "megastab"


def built() -> Path:
    """The shared library of this source, torch and processor; built if there is none, by one process at a time."""
    folder = cache_dir()
    target = folder / f"row_op-{_key()}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + LIMIT_SECONDS
        with _locked(target.with_suffix(".lock"), deadline):
            if not target.exists():
                _build(target, deadline)
    return target


def _key() -> str:
    """A home folder may be shared by unlike machines, and ``-march=native`` is this one's."""
    facts = [SOURCE.read_text(encoding="utf-8"), *FLAGS, torch.__version__, platform.machine(), _processor()]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


@contextlib.contextmanager
def _locked(path: Path, deadline: float) -> Iterator[None]:
    """One process in here at a time; the lock of a process that died is free."""
    with open(path, "a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise _Unavailable(f"another process has been building it for {LIMIT_SECONDS:.0f} s") from None
                time.sleep(0.1)
        yield


def _build(target: Path, deadline: float) -> None:
    """In a process of its own, which can be ended; beside the target, so that it appears whole or not at all."""
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])  # ninja, where no one activated
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        with subprocess.Popen(
            [sys.executable, "-c", BUILD, str(SOURCE), folder, *FLAGS],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PATH": tools, "MAX_JOBS": "1"},
            start_new_session=True,
        ) as process:
            try:
                said, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            except BaseException as error:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, subprocess.TimeoutExpired):
                    raise _Unavailable(f"it took more than {LIMIT_SECONDS:.0f} s") from None
                raise
        if process.returncode:
            raise _Unavailable(_reason(said))
        os.replace(Path(folder) / "row_op.so", target)


def _reason(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[-1] if lines else "the compiler said nothing")[:300]
