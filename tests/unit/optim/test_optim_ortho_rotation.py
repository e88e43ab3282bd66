"""Q: orthogonal, no signed permutation, a function of (seed, name, width), and the same bits for a row whoever is beside it."""

from __future__ import annotations

import pytest
import torch

from megastab.config.errors import UserError
from megastab.optim.rotation import Rotation, factors, haar, rotation_of, true_fp32, walsh_hadamard

WIDTHS = (2, 3, 16, 17, 20, 24, 48, 64, 192, 768)
SIGNS = [1, -1, 1, 1, 1, -1, 1, -1, 1, -1, -1, 1, -1, 1, 1, 1, -1, 1, 1, 1, 1, -1, -1, 1]
ENTRY = 0.3508136
each = pytest.mark.parametrize("width", WIDTHS)
each_kind = pytest.mark.parametrize("kind", ["hadamard", "haar"])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def dense(rotation: Rotation) -> torch.Tensor:
    """Q as a matrix: forward of the unit rows gives its columns."""
    eye = torch.eye(rotation.width)
    return torch.cat([rotation.forward(eye[here], slot) for here, slot in rotation.pieces(0, rotation.width)]).t()


def turned(rotation: Rotation, rows: torch.Tensor, first: int = 0) -> torch.Tensor:
    return torch.cat([rotation.forward(rows[here], slot) for here, slot in rotation.pieces(first, rows.shape[0])])


@each_kind
@each
def test_q_is_orthogonal_and_no_signed_permutation(kind: str, width: int) -> None:
    q = dense(rotation_of(kind, 3, "a", width)).double()
    assert (q @ q.t() - torch.eye(width)).abs().max() < 1e-6
    assert q.abs().max() < 0.999, "a signed permutation would change nothing: Adam is equivariant to it"


@each_kind
@each
def test_inverse_undoes_forward(kind: str, width: int) -> None:
    rotation, rows = rotation_of(kind, 3, "a", width), torch.randn(5, width)
    for here, slot in rotation.pieces(7, 5):
        turned_rows = rotation.forward(rows[here], slot)
        assert torch.allclose(rotation.inverse(turned_rows, slot), rows[here], atol=2e-6)
        assert torch.allclose(turned_rows.norm(dim=1), rows[here].norm(dim=1), rtol=1e-6)


@pytest.mark.parametrize("width", [16, 64, 192, 20])
def test_hadamard_is_the_textbook_product(width: int) -> None:
    """Independent of the split into two factors: Kronecker(A, H) diag(signs) / sqrt(2^k), H in Sylvester's order."""
    rotation, (odd, power) = rotation_of("hadamard", 1, "a", width), factors(width)
    assert rotation.signs is not None and rotation.left is not None
    small = rotation.right.shape[0]
    head = rotation.left[:: power // small, :: power // small]  # H's first entry is 1: what is left is A
    expected = torch.kron(head, walsh_hadamard(power)) * rotation.signs / power**0.5
    assert odd == head.shape[0] and torch.allclose(dense(rotation), expected, atol=1e-6)


def test_q_depends_on_seed_name_and_width_only() -> None:
    first = rotation_of("hadamard", 1, "layers.0.q", 64)
    torch.manual_seed(99)
    again = rotation_of("hadamard", 1, "layers.0.q", 64)
    assert torch.equal(dense(first), dense(again))
    for other in (rotation_of("hadamard", 2, "layers.0.q", 64), rotation_of("hadamard", 1, "layers.0.k", 64)):
        assert not torch.equal(dense(first), dense(other))


def test_haar_is_uniform() -> None:
    """Without the signs of R's diagonal the first entry of Q would be negative in every draw."""
    draws = [haar(3, torch.Generator().manual_seed(seed))[0, 0] for seed in range(400)]
    assert abs(float(torch.stack(draws).mean())) < 4 * (1 / 3 / 400) ** 0.5  # an entry has variance 1 / size


def test_hadamard_keeps_its_numbers() -> None:
    """Moments in a checkpoint mean nothing under another Q: these signs and this entry may never change."""
    rotation = rotation_of("hadamard", 0, "layers.0.q", 24)
    assert rotation.signs is not None
    assert rotation.signs.int().tolist() == SIGNS
    assert float(dense(rotation)[5, 7]) == pytest.approx(ENTRY, abs=1e-6)


@each_kind
@pytest.mark.parametrize("width", [20, 64, 192, 768])
def test_bits_of_a_row_do_not_depend_on_its_neighbours(kind: str, width: int) -> None:
    rotation = rotation_of(kind, 5, "a", width)
    rows = torch.randn(2 * rotation.block_rows + 3, width)
    whole = turned(rotation, rows)
    for first, count in ((0, 1), (3, 1), (rotation.block_rows - 1, 2), (1, rotation.block_rows), (rows.shape[0] - 1, 1), (2, 7)):
        part = rows[first : first + count].clone()
        assert torch.equal(turned(rotation, part, first), whole[first : first + count]), (first, count)


def test_coordinates_that_cancel_are_exactly_zero() -> None:
    """Rounding noise there would become a step of size lr: the scale (here not a power of two) comes after the sums."""
    rotation, rows = rotation_of("hadamard", 0, "a", 512), torch.randint(-2, 3, (9, 512)).float()
    exact = (rows.double() * rotation.signs @ walsh_hadamard(512).double()).float()
    assert int((exact == 0).sum()) > 50
    assert torch.equal(rotation.forward(rows), exact * rotation.scale)


def test_width_without_a_usable_factor_is_refused() -> None:
    with pytest.raises(UserError, match=r"rows of 1001 = 1001 x 1, .* at most 64: choose rotation \"haar\""):
        rotation_of("hadamard", 0, "a", 1001)
    assert rotation_of("hadamard", 0, "a", 63 * 2).width == 126


def test_products_are_true_fp32_whatever_the_global_precision_says() -> None:
    matmul = torch.backends.mkldnn.matmul
    torch.set_float32_matmul_precision("medium")
    try:
        assert matmul.fp32_precision == "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16), true_fp32(torch.device("cpu")):
            assert matmul.fp32_precision == "ieee" and torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.mm(torch.eye(2), torch.eye(2)).dtype == torch.float32
        assert torch.get_float32_matmul_precision() == "medium" and matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")
