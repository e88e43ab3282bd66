"""OrthoAdam under every wrapper is OrthoAdam on one process to the bit, weights and moments, where the gradients are equal.

The gradients are put in the client optimizer's hands: a function of (matrix, step), whatever the layout. Width 48 = 3 * 16 and shares
that are no multiple of it, so that partitions cut rows.
"""

from __future__ import annotations

import functools
import hashlib
import os
from typing import Any

import numpy as np
import pytest
import torch

from tests import jobs
from tests.layouts import LLAMA, SINGLE, Layout, config_of
from tests.ranks import run_ranks

MODEL = {**LLAMA, "hidden_size": 48, "ffn_hidden_size": 80, "num_kv_heads": 2, "tie_embeddings": True}
PARAMS = {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "seed": 3}
STEPS = 4
RATES = (0.005, 0.01)  # of the first two steps: a warm-up of 2 to the peak
LAYOUTS: dict[str, tuple[Layout, str]] = {
    "dp2": (Layout(2), "fp32"),
    "tp2": (Layout(2, tp=2), "fp32"),
    "tp2-pp2-sp": (Layout(4, tp=2, pp=2, sp=True, accumulation=2), "fp32"),
    "zero1-dp2": (Layout(2, zero=1), "fp32"),
    "zero1-dp3": (Layout(3, zero=1), "fp32"),
    "zero2-dp2": (Layout(2, zero=2), "fp32"),
    "zero3-dp2": (Layout(2, zero=3), "fp32"),
    "zero3-dp3": (Layout(3, zero=3), "fp32"),
    "zero3-dp4": (Layout(4, zero=3), "fp32"),
    "zero1-pp2-dp2": (Layout(4, pp=2, zero=1, accumulation=2), "fp32"),
    "zero3-tp2-dp2": (Layout(4, tp=2, zero=3), "fp32"),
    "zero2-offload": (Layout(3, zero=2, offload=True), "fp32"),
    "bf16-dp2": (Layout(2, zero=1), "bf16"),
    "bf16-dp3": (Layout(3, zero=1), "bf16"),
    "bf16-zero3-dp3": (Layout(3, zero=3), "bf16"),
    "bf16-zero3-offload": (Layout(3, zero=3, offload=True), "bf16"),
    "fp16-zero1-dp3": (Layout(3, zero=1), "fp16"),
    "fp16-zero2-dp2": (Layout(2, zero=2), "fp16"),
}
# Nothing is partitioned, or every matrix has a multiple of the ranks as its rows, and ZeRO-3 cuts each in equal parts.
UNCUT = ("dp2", "tp2", "tp2-pp2-sp", "zero3-dp2", "zero3-dp4", "zero3-tp2-dp2")
each_layout = pytest.mark.parametrize("name", LAYOUTS)
Whole = dict[str, np.ndarray]


def gradient_of(name: str, size: int, step: int) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(f"{name}|{step}".encode()).digest()[:4], "big")
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def place_in(tensors: list[torch.Tensor], fragment: Any) -> tuple[torch.Tensor, slice] | None:
    """The tensor the optimizer is stepped on that holds the fragment, and where."""
    for tensor in tensors:
        first = (fragment.master.data_ptr() - tensor.data_ptr()) // 4
        if 0 <= first < tensor.numel():
            return tensor, slice(first, first + fragment.master.numel())
    return None


def given_gradients(job: jobs.Job) -> Any:
    """Have the client optimizer see ``gradient_of`` in place of what backward made; returns it."""
    wrapper = job.built.engine.optimizer
    client = getattr(wrapper, "optimizer", wrapper)
    update, state = client.step, {"step": 0}
    last = {id(flat) for flat in job.built.adapter.stepped()[-1:]}

    def step(*args: Any, **kwargs: Any) -> Any:
        stepped = [p for group in client.param_groups for p in group["params"] if p.grad is not None and p.numel()]
        for fragment in job.built.adapter.fragments():
            part, width = fragment.part, fragment.info.width or 1
            if found := place_in(stepped, fragment):
                first = part.start * width + fragment.start
                whole = gradient_of(part.name, part.global_rows * width, state["step"])
                found[0].grad.view(-1)[found[1]] = whole[first : first + fragment.master.numel()]
        state["step"] += any(id(p) in last for p in stepped)
        return update(*args, **kwargs)

    client.step = step
    return client


def moments(job: jobs.Job, client: Any, key: str) -> list[jobs.Piece]:
    out = []
    for fragment in job.built.adapter.fragments():
        found = place_in(list(client.state), fragment)
        assert found is not None
        out.append(jobs.piece(fragment, client.state[found[0]][key].view(-1)[found[1]]))
    return out


def run(layout: Layout, dtype: str, params: dict[str, Any], steps: int = STEPS) -> dict[str, Any]:
    """On a rank: masters and moments after a few steps on given gradients, and what the exchange costs."""
    from megastab.parallel import collectives

    changes = {"ds__fp16": {"enabled": True, "initial_scale_power": 4}} if dtype == "fp16" else {}
    config = config_of(layout, "AdamW", dtype, model=MODEL, **changes)
    config["zero_optimization"] |= {key: params.pop(key) for key in ("sub_group_size",) if key in params}
    kind = params.pop("type", "OrthoAdam")
    config["optimizer"] = {"type": kind, "params": {**PARAMS, **params} if kind == "OrthoAdam" else params}
    job = jobs.start(config)
    client, launches = given_gradients(job), []
    exchange = collectives.exchange_rows
    collectives.exchange_rows = lambda rows, *rest: (launches.append(rows.shape[0]), exchange(rows, *rest))[1]
    for _ in range(steps):
        job.step()
    collectives.exchange_rows = exchange
    plans = getattr(client, "plans", None) or {}
    cuts = [plan.cuts for plan in plans.values() if plan.cuts is not None]
    return {
        "weights": jobs.masters(job),
        **{key: moments(job, client, key) for key in ("exp_avg", "exp_avg_sq")},
        "launches": launches,
        "cut": sum(cut.total for cut in cuts),
        "flats": len(cuts),
        "gathers": sum(len(plan.gathered.rounds) for plan in plans.values() if plan.gathered is not None),
        "said": job.built.groups,
        "wrapper": type(job.built.engine.optimizer).__name__,
    }


@functools.cache
def single(dtype: str, rotation: str = "hadamard", vectors: bool = False, axes: str = "last") -> dict[str, Whole]:
    """One process; at stage 1 in low precision, where masters are the rounded weights."""
    layout = SINGLE if dtype == "fp32" else Layout(1, zero=1)
    (found,) = run_ranks(1, run, layout, dtype, settings_of(rotation, vectors, axes))
    return {key: jobs.merge([found[key]])[0] for key in ("weights", "exp_avg", "exp_avg_sq")}


@functools.cache
def ranks_of(name: str, rotation: str = "hadamard", vectors: bool = False, axes: str = "last") -> list[dict[str, Any]]:
    layout, dtype = LAYOUTS[name]
    return run_ranks(layout.world, run, layout, dtype, settings_of(rotation, vectors, axes))


def settings_of(rotation: str, vectors: bool, axes: str) -> dict[str, Any]:
    """With both axes the embedding's columns are too long: its rows lie in the same flat tensors as whole matrices."""
    longest = {"max_axis": 100} if axes == "both" else {}
    return {"rotation": rotation, "rotate_vectors": vectors, "axes": axes, **longest}


def assert_equal_to_single(name: str, rotation: str, vectors: bool = False, axes: str = "last") -> None:
    ranks, expected = ranks_of(name, rotation, vectors, axes), single(LAYOUTS[name][1], rotation, vectors, axes)
    for key, whole in expected.items():
        mine, drift = jobs.merge(rank[key] for rank in ranks)
        assert drift == 0.0, f"copies of one element differ by {drift} ({key})"
        assert mine.keys() == whole.keys()
        for matrix in whole:
            assert np.array_equal(mine[matrix], whole[matrix]), (key, matrix, float(np.abs(mine[matrix] - whole[matrix]).max()))


@each_layout
def test_weights_and_moments_are_those_of_one_process_to_the_bit(name: str) -> None:
    assert_equal_to_single(name, "hadamard")


@pytest.mark.parametrize("name", ["tp2-pp2-sp", "zero1-dp3", "zero3-dp3", "zero3-tp2-dp2"])
def test_dense_haar_too(name: str) -> None:
    assert_equal_to_single(name, "haar")


@pytest.mark.parametrize("name", ["tp2-pp2-sp", "zero1-dp3", "zero3-dp2", "bf16-dp3"])
def test_rotated_vectors_too(name: str) -> None:
    assert_equal_to_single(name, "hadamard", vectors=True)
    if name == "zero3-dp2":
        assert all(rank["cut"] == 5 and len(rank["launches"]) == STEPS for rank in ranks_of(name, "hadamard", vectors=True)), "five gains"


BOTH = ("dp2", "tp2-pp2-sp", "zero1-dp3", "zero2-offload", "zero3-dp3", "zero1-pp2-dp2", "zero3-tp2-dp2", "bf16-dp3", "fp16-zero2-dp2")


@pytest.mark.parametrize("name", BOTH)
def test_both_axes_too(name: str) -> None:
    """Whole matrices are gathered over data- and tensor-parallel ranks; fused q, k, v are matrices of their own."""
    assert_equal_to_single(name, "hadamard", axes="both")
    ranks = ranks_of(name, "hadamard", axes="both")
    assert len({len(rank["launches"]) for rank in ranks}) == 1 or LAYOUTS[name][0].pp > 1
    assert all(rank["gathers"] for rank in ranks) == (name != "dp2")
    assert all(len(rank["launches"]) == STEPS * (rank["gathers"] + rank["flats"]) for rank in ranks)
    said = ranks[0]["said"]
    assert ("and none is gathered" if name == "dp2" else "MB sent a rank and step") in said and "axes both" in said, said


@pytest.mark.parametrize("name", ["tp2-pp2-sp", "zero3-tp2-dp2"])
def test_both_axes_by_dense_haar_with_vectors_too(name: str) -> None:
    assert_equal_to_single(name, "haar", vectors=True, axes="both")


def test_each_sub_group_with_a_cut_row_exchanges_once() -> None:
    """ZeRO-3 updates sub-group after sub-group; each is planned and completed on its own."""
    ranks = run_ranks(3, run, Layout(3, zero=3), "fp32", {"sub_group_size": 2000})
    expected = single("fp32")
    for key, whole in expected.items():
        mine, _ = jobs.merge(rank[key] for rank in ranks)
        assert all(np.array_equal(mine[matrix], values) for matrix, values in whole.items()), key
    assert all(rank["flats"] > 1 and len(rank["launches"]) == STEPS * rank["flats"] for rank in ranks)


@each_layout
def test_one_exchange_for_each_flat_tensor_with_a_cut_row(name: str) -> None:
    """Each rank sends its fragments of cut rows to their other owners, nothing else, and says so at the start."""
    ranks, (layout, _) = ranks_of(name), LAYOUTS[name]
    for rank in ranks:
        assert len(rank["launches"]) == STEPS * rank["flats"], rank["launches"]
        assert rank["flats"] <= 1, "one group, one exchange"
        # A row has at most width - 1 elements to send to each of its other owners.
        assert all(sent < rank["cut"] * 48 * (layout.dp - 1) for sent in rank["launches"])
    cut = [rank["cut"] for rank in ranks]
    assert any(cut) == (name not in UNCUT), cut
    said = ranks[0]["said"]
    assert ("no row is cut: nothing is exchanged" if name in UNCUT else "1 exchanges a step") in said, said
    assert "15 matrices, 99.4 % of the parameters" in said and "hadamard, axes last, rows of 48" in said and ranks[0]["wrapper"] in said, (
        said
    )


ADAMW = {key: value for key, value in PARAMS.items() if key != "seed"}


@pytest.mark.parametrize("name", ["tp2-pp2-sp", "zero1-dp3", "zero3-dp3", "bf16-dp2", "zero2-offload"])
def test_none_is_the_trainers_adamw_to_the_bit(name: str) -> None:
    layout, dtype = LAYOUTS[name]
    mine = run_ranks(layout.world, run, layout, dtype, {"rotation": "none"})
    theirs = run_ranks(layout.world, run, layout, dtype, {"type": "AdamW", **ADAMW})
    for key in ("weights", "exp_avg", "exp_avg_sq"):
        for a, b in zip(mine, theirs, strict=True):
            assert all(p[:3] == q[:3] and np.array_equal(p[3], q[3]) for p, q in zip(a[key], b[key], strict=True)), key
    assert not any(rank["launches"] for rank in mine)


@pytest.mark.parametrize("name", ["single", "zero1-dp3"])
def test_matrices_are_rotated_and_decay_and_vectors_are_adamws(name: str) -> None:
    (adam,) = run_ranks(1, run, SINGLE, "fp32", {"type": "AdamW", **ADAMW})
    expected = jobs.merge([adam["weights"]])[0]
    found = single("fp32")["weights"] if name == "single" else jobs.merge(rank["weights"] for rank in ranks_of(name))[0]
    for matrix, values in found.items():
        deviation = float(np.abs(values - expected[matrix]).max())
        assert deviation < 1e-6 if "norm" in matrix else deviation > 1e-3, (matrix, deviation)
    # What decay alone does: rotations leave it where AdamW puts it.
    (without,) = run_ranks(1, run, SINGLE, "fp32", {"weight_decay": 0.0})
    bare = jobs.merge([without["weights"]])[0]
    for matrix, values in single("fp32")["weights"].items():
        assert np.array_equal(values, bare[matrix]) == ("norm" in matrix), matrix


def tied_copies(steps: int) -> list[jobs.Piece]:
    """On a rank: masters and moments after real steps with a dense Q."""
    layout = Layout(4, tp=2, pp=2, accumulation=2)
    config = config_of(layout, "OrthoAdam", model=MODEL, run={"total_steps": steps}, ds__optimizer__params={"rotation": "haar"})
    job = jobs.start(config)
    for _ in range(steps):
        job.step()
    wrapper = job.built.engine.optimizer
    found = {"w": jobs.masters(job), **{key: moments(job, wrapper, key) for key in ("exp_avg", "exp_avg_sq")}}
    return [(f"{what}/{name}", *rest) for what, pieces in found.items() for name, *rest in pieces]


def test_tied_copies_on_two_stages_stay_bit_equal() -> None:
    ranks = run_ranks(4, tied_copies, 200, timeout=300)
    _, drift = jobs.merge(ranks)
    assert drift == 0.0


# -- refusals ------------------------------------------------------------------------------------------------------------


def attempt(layout: Layout, params: dict[str, Any]) -> tuple[str, str]:
    """On a rank: how building fails."""
    from megastab.config.errors import UserError
    from megastab.optim import ortho_binding
    from megastab.parallel.collectives import PeerFailed

    if free := params.pop("free", 0):
        ortho_binding.available_bytes = lambda device: free
    try:
        run(layout, "fp32", params, steps=1)
    except (UserError, PeerFailed) as error:
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize(
    ("layout", "params", "said"),
    [
        (Layout(2, zero=3), {"axes": "both", "free": 500_000}, "[128, 48] takes 0.000123 GB of temporaries on a rank; with the moments"),
        (Layout(2, zero=1), {"axes": "both", "free": 500_000}, "GB for 2 ranks and has 0.0005 GB"),
        (Layout(2, zero=1), {"max_axis": 2}, "OrthoAdam rotates nothing"),
        (Layout(2, tp=2), {"max_axis": 2}, "OrthoAdam rotates nothing"),
    ],
    ids=["both-zero3", "both-zero1", "nothing-zero1", "nothing-tp2"],
)
def test_what_cannot_be_rotated_is_refused_once(layout: Layout, params: dict[str, Any], said: str) -> None:
    (first, message), (second, _) = run_ranks(2, attempt, layout, params)
    assert (first, second) == ("UserError", "PeerFailed") and said in message, message


def built_alone(rotation: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], str]:
    """On a rank: weights of the trainer's engine and of one OrthoAdam over the logical matrices, both axes and vectors rotated."""
    from megastab import OrthoAdam
    from megastab.optim import row_op

    os.environ[row_op.SWITCH] = "0"  # the second engine would switch the vectors' rows to the op, the first has none
    settings = {"rotation": rotation, "axes": "both", "rotate_vectors": True}
    found = run(SINGLE, "fp32", settings, steps=len(RATES))
    mine = jobs.merge([found["weights"]])[0]
    job = jobs.start(config_of(SINGLE, "OrthoAdam", model=MODEL))
    named = []
    for fragment in job.built.adapter.fragments():
        shape = (fragment.part.rows, fragment.info.width) if fragment.info.width else (fragment.part.rows,)
        named.append((fragment.part.name, torch.nn.Parameter(fragment.master.detach().clone().view(shape))))
    decayed = [pair for pair in named if pair[1].ndim > 1]
    groups = [{"params": decayed}, {"params": [pair for pair in named if pair[1].ndim == 1], "weight_decay": 0.0}]
    alone = OrthoAdam(groups, **{**PARAMS, "betas": tuple(PARAMS["betas"])}, **settings)
    for step, rate in enumerate(RATES):
        for group in alone.param_groups:
            group["lr"] = rate
        for name, parameter in named:
            parameter.grad = gradient_of(name, parameter.numel(), step).view_as(parameter)
        alone.step()
    return mine, {name: p.detach().flatten().numpy() for name, p in named}, found["said"]


@pytest.mark.parametrize("rotation", ["hadamard", "haar"])
def test_both_axes_and_vectors_in_the_trainer_are_those_of_the_plain_optimizer(rotation: str) -> None:
    """Fused q, k, v are matrices of their own; where nothing is cut, the trainer rotates columns too."""
    ((mine, alone, said),) = run_ranks(1, built_alone, rotation)
    assert mine.keys() == alone.keys() and "axes both" in said
    for name, values in alone.items():
        assert np.array_equal(mine[name], values), name
