"""The orthogonal matrices of OrthoAdam (arXiv 2410.17174): Q as a function of (seed, canonical name, width) and of nothing else.

``hadamard``: random signs, then Kronecker(A, H) for a width of m * 2^k, m odd: H the Walsh-Hadamard matrix of 2^k in Sylvester's
order, A a Haar matrix of m (1 for m = 1). ``haar``: one dense Haar matrix. Neither is stored anywhere: a resume draws them again.

Rows are rotated by small matrix products over blocks of a fixed shape, in which a row's place follows from its number in the whole
matrix. A product of a row can round otherwise in a block of another shape; so a row's bits depend on the row alone, not on who else is
rotated with it. Signed permutations are left out on purpose: Adam is exactly equivariant to them.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megastab.config.errors import UserError

RotationKind = Literal["hadamard", "haar", "none"]

BLOCK_ELEMENTS = 1 << 17  # 512 KiB of fp32: few enough to stay in cache, many enough for two threads and to pay for a dozen torch calls
DENSE_ROWS = 128  # of a dense Q, which is read once a block
ALIGNMENT = 64  # bytes, torch's own on the CPU
BLOCK_ROWS = 256  # at most: narrow matrices are not padded to more
COLUMNS = "|columns"  # after a matrix's name: the Q of its columns
MAX_ODD = 64  # odd part of a Hadamard width: the Haar factor costs a dense odd x odd product a row


@dataclass(frozen=True)
class Rotation:
    """Q of one width D: ``forward`` is x -> Q x for each row x, ``inverse`` is y -> Q^T y.

    A row viewed as [a, b] becomes left @ (signs * row) @ right^T, times ``scale``.
    """

    width: int
    right: Tensor
    """[b, b], fp32."""
    left: Tensor | None = None
    """[a, a], fp32, a * b = D; None for a dense Q."""
    signs: Tensor | None = None
    """[D] of +-1."""
    scale: float = 1.0

    @property
    def block_rows(self) -> int:
        """Rows of the fixed shape everything is computed in."""
        if self.left is None:
            return DENSE_ROWS
        return max(1, min(BLOCK_ROWS, BLOCK_ELEMENTS // self.width))

    @property
    def tensors(self) -> list[Tensor]:
        """All it holds; Walsh-Hadamard factors are shared by all rotations of a process."""
        return [t for t in (self.right, self.left, self.signs, self._right, self._left_back) if t is not None]

    def pieces(self, first: int, count: int) -> Iterator[tuple[slice, int]]:
        """Rows [first, first + count) of a matrix by block: (which of the rows given, place of the first in its block)."""
        done = 0
        while done < count:
            slot = (first + done) % self.block_rows
            stop = min(count, done + self.block_rows - slot)
            yield slice(done, stop), slot
            done = stop

    def space(self, device: torch.device) -> Tensor:
        """[3, block_rows, D]: the first two are what a turn works in, the third is the caller's."""
        return torch.empty(3, self.block_rows, self.width, dtype=torch.float32, device=device)

    def forward(self, rows: Tensor, slot: int = 0, space: Tensor | None = None) -> Tensor:
        """[n, D] -> [n, D]: rows that lie at ``slot`` and after in their block. The result lies in ``space`` where that is given."""
        space = self.space(rows.device) if space is None else space
        block = self._products(self._placed(rows, slot, space[0], self.signs), self._right.t(), self.left, space)
        # After the sums, not before: coordinates that cancel exactly must give zero, which Adam would else lift to a step of size lr.
        return (block if self._rest == 1.0 else block.mul_(self._rest))[slot : slot + rows.shape[0]]

    def inverse(self, rows: Tensor, slot: int = 0, space: Tensor | None = None) -> Tensor:
        """Undo :meth:`forward`."""
        space = self.space(rows.device) if space is None else space
        is_block = rows.shape[0] == self.block_rows and rows.is_contiguous() and rows.data_ptr() % ALIGNMENT == 0
        block = self._products(rows if is_block else self._placed(rows, slot, space[0]), self._right, self._left_back, space)
        if self.signs is not None:
            block.mul_(self.signs)
        return block[slot : slot + rows.shape[0]]

    @property
    def _rest(self) -> float:
        """``scale`` without its power of two, which rounds nothing and so is in the right factor for free."""
        return 1.0 if math.frexp(self.scale)[0] == 0.5 else math.sqrt(0.5)

    @functools.cached_property
    def _right(self) -> Tensor:
        return self.right if self.left is None else _walsh_hadamard_times(self.right.shape[0], self.scale / self._rest, self.right.device)

    @functools.cached_property
    def _left_back(self) -> Tensor | None:
        """Of the inverse, with the rest of the scale."""
        if self.left is None:
            return None
        if _is_power(self.left.shape[0]):
            return _walsh_hadamard_times(self.left.shape[0], self._rest, self.right.device)
        return self.left.t() * self._rest

    def _placed(self, rows: Tensor, slot: int, block: Tensor, signs: Tensor | None = None) -> Tensor:
        """The rows in a block: the same shape, the same place and the same alignment whatever lies beside them."""
        if rows.shape[0] < self.block_rows:
            block.zero_()
        here = block[slot : slot + rows.shape[0]]
        if signs is None:
            here.copy_(rows)
        else:
            torch.mul(rows, signs, out=here)
        return block

    def _products(self, block: Tensor, right: Tensor, left: Tensor | None, space: Tensor) -> Tensor:
        first, out, small = space[0], space[1], right.shape[0]
        torch.mm(block.view(-1, small), right, out=out.view(-1, small))
        if left is None:
            return out
        shape = (self.block_rows, left.shape[0], small)
        torch.bmm(left.expand(shape[0], -1, -1), out.view(shape), out=first.view(shape))
        return first


def rotation_of(kind: RotationKind, seed: int, name: str, width: int, device: torch.device | str = "cpu") -> Rotation:
    """Q of one matrix.

    Args:
        kind: ``hadamard`` or ``haar``.
        seed: of the run.
        name: canonical name of the matrix; for a Q that all matrices of a width share, any fixed text.
        width: length of a row.
        device: where the factors shall lie; they are drawn on the CPU.

    Raises:
        UserError: a width ``hadamard`` cannot factor.
    """
    digest = hashlib.sha256(f"{seed}|{name}|{width}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    if kind == "haar":
        return Rotation(width, haar(width, generator).to(device))
    odd, power = factors(width)
    if odd > MAX_ODD:
        axis = "columns" if name.endswith(COLUMNS) else "rows"
        raise UserError(
            f"OrthoAdam: {name.removesuffix(COLUMNS)} has {axis} of {width} = {odd} x {power}, and hadamard rotates widths of m * 2^k with "
            f'm odd and at most {MAX_ODD}: choose rotation "haar", another width, or a max_axis below {width}, which leaves the axis alone'
        )
    signs = torch.randint(2, (width,), generator=generator).to(torch.float32) * 2 - 1
    small = min(power, 1 << math.floor(math.log2(width) / 2 + 0.5))  # the wider of two: products of single rows are slower
    place = torch.device(device)
    right, left = (_walsh_hadamard_times(size, 1.0, place) for size in (small, power // small))
    if odd > 1:
        left = torch.kron(haar(odd, generator).to(device), left)
    return Rotation(width, right, left, signs.to(device), power**-0.5)


def factors(width: int) -> tuple[int, int]:
    """(odd part, power of two) of a width."""
    power = width & -width
    return width // power, power


def haar(size: int, generator: torch.Generator) -> Tensor:
    """[size, size] drawn uniformly from the orthogonal matrices, fp32."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float().contiguous()  # without the signs of R's diagonal it is not uniform


def walsh_hadamard(size: int) -> Tensor:
    """[size, size] of +-1 in Sylvester's order; ``size`` is a power of two. Symmetric; its square is ``size`` times the identity."""
    out = torch.ones(1, 1)
    while out.shape[0] < size:
        out = torch.cat([torch.cat([out, out], 1), torch.cat([out, -out], 1)])
    return out


@functools.lru_cache(maxsize=64)
def _walsh_hadamard_times(size: int, factor: float, device: torch.device) -> Tensor:
    """One for all rotations: kept, it would else be most of what a narrow matrix's rotation occupies."""
    return (walsh_hadamard(size) * factor).to(device)


def _is_power(size: int) -> bool:
    return size & (size - 1) == 0


@contextmanager
def true_fp32(device: torch.device) -> Iterator[None]:
    """Products in full fp32 whatever the global precision of matrix products says, and under autocast too."""
    every: Any = torch.backends
    backends = (every.mkldnn.matmul, every.cuda.matmul)
    held = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, held, strict=True):
            backend.fp32_precision = precision
