"""OrthoAdam on one process: golden numbers, a dense reference in fp64, its relations to Adam, what it refuses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import megastab
from megastab.config.errors import UserError
from megastab.optim.ortho_adam import OrthoAdam
from megastab.optim.rotation import Rotation, rotation_of
from megastab.optim.row_step import Pace, Views, step_both, step_plain, step_rows

Turn = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def gradients(shape: tuple[int, ...], steps: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def train(optimizer: torch.optim.Optimizer, given: list[list[Tensor]]) -> list[Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(len(given[0])):
        for parameter, grads in zip(parameters, given, strict=True):
            parameter.grad = grads[step].clone()
        optimizer.step()
    return [p.detach() for p in parameters]


def reference(weights: Tensor, grads: list[Tensor], turn: Turn, back: Turn, lr: float, betas: Any, eps: float, decay: float) -> Tensor:
    """The algorithm written down in fp64."""
    w, (b1, b2) = weights.double(), betas
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, grad in enumerate(grads, 1):
        r = turn(grad.double())
        m, v = b1 * m + (1 - b1) * r, b2 * v + (1 - b2) * r * r
        w = w - lr * (back((m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)) + decay * w)
    return w


def dense(rotation: Rotation) -> Tensor:
    eye = torch.eye(rotation.width)
    return torch.cat([rotation.forward(eye[here], slot) for here, slot in rotation.pieces(0, rotation.width)]).t().double()


@pytest.mark.parametrize(("gradient", "expected"), [([1.0, 0.0], [1.4142136, 0.0]), ([3.0, 1.0], [1.4142136, 0.0])])
def test_golden_numbers_of_the_sign_update(gradient: list[float], expected: list[float]) -> None:
    """ALGORITHMS 13.9: Q = [[c, c], [-c, c]] on the left, betas and eps 0."""
    c = math.sqrt(0.5)
    left = Rotation(2, torch.tensor([[c, c], [-c, c]]))
    weights, pace = torch.zeros(2, 1), Pace(1.0, 0.0, 0.0, 0.0, 1)
    step_both(Views(weights, torch.tensor(gradient).view(2, 1), torch.zeros(2, 1), torch.zeros(2, 1)), left, None, pace)
    assert weights.view(-1).tolist() == pytest.approx([-x for x in expected], abs=1e-6)


@pytest.mark.parametrize("rotation", ["hadamard", "haar"])
@pytest.mark.parametrize("axes", ["last", "both"])
def test_fifty_steps_equal_a_dense_reference(rotation: Any, axes: Any) -> None:
    weights, grads = 0.1 * torch.randn(40, 48), gradients((40, 48), 50)
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizer = OrthoAdam([("w", nn.Parameter(weights.clone()))], **settings, weight_decay=0.1, rotation=rotation, axes=axes, seed=4)
    (mine,) = train(optimizer, [grads])
    shared = "rows of this width"
    right = dense(rotation_of(rotation, 4, "w" if rotation == "hadamard" else shared, 48))
    left = (
        dense(rotation_of(rotation, 4, "w|columns" if rotation == "hadamard" else shared, 40)) if axes == "both" else torch.eye(40).double()
    )
    exact = reference(weights, grads, lambda g: left @ g @ right.t(), lambda s: left.t() @ s @ right, decay=0.1, **settings)
    assert (mine.double() - exact).abs().max() < 1e-6
    plain = reference(weights, grads, lambda g: g, lambda s: s, decay=0.1, **settings)
    assert (plain - exact).abs().max() > 0.01, "Adam would have gone elsewhere"


def test_signed_permutation_is_adam_and_haar_is_not() -> None:
    """ALGORITHMS 13.9: Adam is exactly equivariant to signed permutations, so such a Q would be Adam at more cost."""
    generator = torch.Generator().manual_seed(0)
    signed = torch.eye(6)[torch.randperm(6, generator=generator)] * torch.tensor([1.0, -1, -1, 1, -1, 1])
    found = []
    for q in (torch.eye(6), signed, rotation_of("haar", 0, "w", 6).right):
        views = [torch.zeros(4, 6) for _ in range(4)]
        for step, gradient in enumerate(gradients((4, 6), 50), 1):
            step_rows(Views(views[0], gradient, *views[2:]), Rotation(6, q), 0, Pace(0.01, 0.9, 0.95, 1e-8, step))
        found.append(views[0])
    assert torch.equal(found[0], found[1])
    assert (found[0] - found[2]).abs().max() > 0.01


def test_none_is_torchs_fused_adamw_to_the_bit() -> None:
    """Fused is what the trainer's AdamW is; torch's other implementations differ from it in the last bit."""
    shapes: list[tuple[int, ...]] = [(40, 48), (37,), (3, 5, 7), (1,)]
    settings: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    given = [gradients(shape, 20, seed) for seed, shape in enumerate(shapes)]
    made = [torch.randn(shape) for shape in shapes]
    mine = OrthoAdam([nn.Parameter(w.clone()) for w in made], **settings, rotation="none")
    theirs = torch.optim.AdamW([nn.Parameter(w.clone()) for w in made], **settings, fused=True)
    for a, b in zip(train(mine, given), train(theirs, given), strict=True):
        assert torch.equal(a, b)
    for a_state, b_state in zip(mine.state.values(), theirs.state.values(), strict=True):
        assert all(torch.equal(a_state[key], b_state[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_vectors_are_plain_adam_unless_asked() -> None:
    weights, grads = torch.randn(20), gradients((20,), 30)
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    matrix = torch.randn(2, 20)
    exact = reference(weights, grads, lambda g: g, lambda s: s, decay=0.0, **settings)
    found = []
    for rotate_vectors in (False, True):
        pairs = [("gain", nn.Parameter(weights.clone())), ("w", nn.Parameter(matrix.clone()))]
        optimizer = OrthoAdam(pairs, **settings, weight_decay=0.0, rotate_vectors=rotate_vectors)
        found.append(train(optimizer, [grads, gradients((2, 20), 30)])[0].double())
    q = dense(rotation_of("hadamard", 0, "gain", 20))
    rotated = reference(weights, grads, lambda g: q @ g, lambda s: q.t() @ s, decay=0.0, **settings)
    assert (found[0] - exact).abs().max() < 1e-6 and (found[1] - rotated).abs().max() < 1e-6
    assert (exact - rotated).abs().max() > 0.01


def test_vectors_that_tensor_parallelism_cuts_are_never_rotated() -> None:
    names = ["layers.0.q.bias", "layers.0.o.bias", "norm", "model.layers.0.mlp.up_proj.bias", "model.layers.0.mlp.down_proj.bias"]
    pairs = [("w", nn.Parameter(torch.zeros(2, 16))), *((name, nn.Parameter(torch.zeros(16))) for name in names)]
    optimizer = OrthoAdam(pairs, lr=1.0, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, rotate_vectors=True)
    found = train(optimizer, [[torch.rand(2, 16)], *([torch.rand(16) + 1] for _ in names)])[1:]
    assert [bool((w == -1).all()) for w in found] == [True, False, False, True, False], "plain Adam's first step is the sign"


def test_axes_too_long_are_left_alone() -> None:
    pairs = [("wide", nn.Parameter(torch.zeros(2, 64))), ("narrow", nn.Parameter(torch.zeros(2, 16)))]
    optimizer = OrthoAdam(pairs, lr=1.0, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, max_axis=32)
    wide, narrow = train(optimizer, [[torch.ones(2, 64)], [torch.rand(2, 16) + 1]])
    assert torch.equal(wide, -torch.ones(2, 64)), "plain Adam: the sign"
    assert not torch.allclose(narrow.abs(), torch.ones(2, 16), atol=1e-2)


def test_decay_by_role_leaves_vectors_alone() -> None:
    pairs = [("w", nn.Parameter(torch.ones(2, 4))), ("gain", nn.Parameter(torch.ones(4)))]
    optimizer = OrthoAdam(pairs, lr=0.5, weight_decay=0.5, decay_by_role=True)
    matrix, gain = train(optimizer, [[torch.zeros(2, 4)], [torch.zeros(4)]])
    assert torch.equal(matrix, torch.full((2, 4), 0.75)) and torch.equal(gain, torch.ones(4))


def test_global_matmul_precision_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    product = torch.mm

    def mm(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return product(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", mm)
    weights, grads, found = torch.randn(64, 512), gradients((64, 512), 3), []
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        try:
            found.append(train(OrthoAdam([("w", nn.Parameter(weights.clone()))], rotation="haar"), [grads])[0])
        finally:
            torch.set_float32_matmul_precision("highest")
    assert torch.equal(*found) and set(seen) == {"ieee"}


def test_bits_of_an_element_do_not_depend_on_where_it_lies() -> None:
    """Partitions begin anywhere: torch's operations must round alike in the body and in the tail of a tensor."""
    given = [torch.randn(1000) for _ in range(4)]
    given[3].square_()
    pace = Pace(1e-2, 0.9, 0.95, 1e-8, 3, 0.1)

    def stepped(here: slice) -> list[Tensor]:
        weights, gradient, mean, square = (tensor[here].clone() for tensor in given)
        step_plain(Views(weights, gradient, mean, square), pace)
        return [weights, mean, square]

    whole = stepped(slice(0, 1000))
    for first in (0, 1, 3, 8, 17):
        for length in (1, 2, 7, 16, 33, 500):
            here = slice(first, first + length)
            assert all(torch.equal(mine, all_of[here]) for mine, all_of in zip(stepped(here), whole, strict=True)), here


def test_resumed_states_go_on_to_the_bit() -> None:
    weights, grads = torch.randn(9, 48), gradients((9, 48), 10)
    (straight,) = train(OrthoAdam([("w", nn.Parameter(weights.clone()))], seed=2), [grads])
    first = OrthoAdam([("w", nn.Parameter(weights.clone()))], seed=2)
    (half,) = train(first, [grads[:5]])
    second = OrthoAdam([("w", nn.Parameter(half.clone()))], seed=2)
    second.load_state_dict(first.state_dict())
    assert torch.equal(train(second, [grads[5:]])[0], straight)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"seed": 3}, "seed 2 and not 3"),
        ({"rotation": "haar", "seed": 2}, "rotation hadamard and not haar"),
        ({"axes": "both", "seed": 2}, "axes last and not both"),
        ({"seed": 2, "max_axis": 16}, "max_axis 8192 and not 16"),
    ],
)
def test_states_of_another_rotation_are_refused(other: dict[str, Any], said: str) -> None:
    saved = OrthoAdam([nn.Parameter(torch.zeros(2, 48))], seed=2)
    with pytest.raises(UserError, match=said):
        OrthoAdam([nn.Parameter(torch.zeros(2, 48))], **other).load_state_dict(saved.state_dict())


def test_states_of_adamw_are_refused() -> None:
    saved = torch.optim.AdamW([nn.Parameter(torch.zeros(2, 48))])
    with pytest.raises(UserError, match="rotation None and not hadamard"):
        OrthoAdam([nn.Parameter(torch.zeros(2, 48))]).load_state_dict(saved.state_dict())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rotation": "dense"}, "rotation = 'dense' is not one of hadamard, haar, none"),
        ({"axes": "first"}, "axes = 'first' is not one of last, both"),
        ({"haar_per": "row"}, "haar_per = 'row'"),
        ({"lr": -1.0}, "lr = -1.0 must be a number from 0"),
        ({"betas": (0.9, 1.0)}, r"betas = \(0.9, 1.0\)"),
        ({"seed": 1.5}, "seed = 1.5 must be a whole number"),
        ({"max_axis": 1}, "max_axis = 1 leaves nothing"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        OrthoAdam([nn.Parameter(torch.zeros(2, 4))], **settings)


def test_group_cannot_have_its_own_rotation() -> None:
    with pytest.raises(UserError, match="a parameter group cannot set seed"):
        OrthoAdam([{"params": [nn.Parameter(torch.zeros(2, 4))], "seed": 7}])


@pytest.mark.parametrize(
    ("parameter", "said"),
    [
        (nn.Parameter(torch.zeros(4)), "none of 1 parameters has an axis to rotate"),
        (nn.Parameter(torch.zeros(2, 4, dtype=torch.bfloat16)), "w is torch.bfloat16: keep fp32 masters"),
        (nn.Parameter(torch.zeros(2, 1001)), "rows of 1001"),
    ],
    ids=["vector", "bf16", "width"],
)
def test_parameters_it_cannot_rotate_are_refused(parameter: nn.Parameter, said: str) -> None:
    with pytest.raises(UserError, match=said):
        train(OrthoAdam([("w", parameter)]), [[torch.zeros_like(parameter)]])


@pytest.mark.parametrize("groups", [False, True])
def test_matrices_without_names_are_rotated_by_place_and_told(groups: bool) -> None:
    given = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2, 4))]
    optimizer = OrthoAdam([{"params": [given[0]]}, {"params": [given[1]]}] if groups else given)
    for parameter in given:
        parameter.grad = torch.ones_like(parameter)
    with pytest.warns(UserWarning, match=r"1 matrices have no names.*model.named_parameters\(\)"):
        optimizer.step()
    rotated, ordinary = given[1].detach(), given[0].detach()
    assert torch.allclose(ordinary, torch.full((4,), -1e-3)) and not torch.allclose(rotated, torch.full((2, 4), -1e-3), rtol=1e-2)


def test_named_matrices_and_vectors_alone_are_no_cause_for_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(OrthoAdam([("w", nn.Parameter(torch.zeros(2, 4)))]), [[torch.zeros(2, 4)]])
        train(OrthoAdam([nn.Parameter(torch.zeros(2, 4))], rotation="none"), [[torch.zeros(2, 4)]])


def test_columns_it_cannot_rotate_are_refused() -> None:
    with pytest.raises(UserError, match="w has columns of 1001 = 1001 x 1"):
        train(OrthoAdam([("w", nn.Parameter(torch.zeros(1001, 4)))], axes="both"), [[torch.zeros(1001, 4)]])


def test_group_cannot_ask_for_torchs_fused_form() -> None:
    with pytest.raises(UserError, match="asks for fused, which is of torch's optimizers"):
        OrthoAdam([{"params": [nn.Parameter(torch.zeros(2, 4))], "fused": True}])


def test_flat_partition_in_place_of_the_parameters_raises() -> None:
    optimizer = OrthoAdam([("w", nn.Parameter(torch.zeros(2, 4)))])
    flat = nn.Parameter(torch.zeros(8))
    flat.grad = torch.ones(8)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match=r"replaced the parameters by flat partitions.*megastab.attach"):
        optimizer.step()


def test_is_public() -> None:
    assert megastab.OrthoAdam is OrthoAdam
