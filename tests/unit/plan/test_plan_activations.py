"""The activation estimate against the tensors a forward leaves behind for backward."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megastab.config.config import Config
from megastab.model.init import init_weights
from megastab.model.transformer import Transformer
from megastab.parallel import collectives
from megastab.parallel.grid import ALONE, Axis, Grid, TensorParallel
from megastab.plan.plan import plan
from tests.ranks import run_ranks
from tests.unit.plan.jobs import small_config


def kept_on_a_rank(arguments: dict[str, Any]) -> int:
    """The same on every rank of a job without pipeline stages."""
    config = small_config(collectives.world()[1], **arguments)
    parallel = config.megastab.parallel
    grid = Grid.create(parallel.tensor, 1, parallel.sequence, config.megastab.model.num_kv_heads, parallel.context)
    return kept_for_backward(config, grid.tp, grid.cp)


def all_kept_on_a_rank(cases: list[dict[str, Any]]) -> list[int]:
    """One layout after another on the ranks of one job."""
    return [kept_on_a_rank(arguments) for arguments in cases]


def kept_for_backward(
    config: Config,
    tp: TensorParallel = ALONE,
    cp: Axis = ALONE,
    prepare: Callable[[Transformer], None] = lambda model: None,
    settle: Callable[[], None] = lambda: None,
) -> int:
    """Bytes alive after a forward that were not before: what autograd saved, and what recompute holds on to. ``prepare`` is called with
    the model, ``settle`` after forward."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]
    model = Transformer(config.megastab, tp, cp)
    init_weights(model, config.megastab.model, 0)
    model = model.to(dtype)
    prepare(model)
    shape = (config.micro_batch, config.megastab.model.max_seq_len // cp.size)
    tokens, weights, samples = torch.randint(0, 500, shape), torch.ones(shape), torch.arange(shape[0])
    gc.collect()
    before = _living()  # held, so that no address is used again
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, tokens, weights, samples)
    settle()
    collectives.barrier()  # a backend's thread lets go of what it sent a moment after it arrived
    gc.collect()
    after, known = _storages([*_living(), *saved]), _storages([*before, loss])
    return sum(size for pointer, size in after.items() if pointer not in known)


def _living() -> list[Tensor]:
    return [x for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter)]


def _storages(tensors: Any) -> dict[int, int]:
    """Bytes by address."""
    found = {}
    for tensor in tensors:
        with contextlib.suppress(RuntimeError):  # tracing, in another test, leaves tensors that have no memory
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


LLAMA = {"hidden_size": 128, "max_seq_len": 64}


@pytest.mark.parametrize(("recompute", "precision"), [("none", "fp32"), ("none", "bf16"), ("selective", "fp32"), ("full", "fp32")])
@pytest.mark.parametrize(
    ("arch", "model"),
    [
        ("llama", {}),
        ("llama", {"num_kv_heads": 1, "activation": "relu2"}),
        ("gpt", {"dropout": 0.1, "tie_embeddings": False}),
        ("gpt", {"activation": "relu"}),
        ("llama", {"sink": "kv_bias", "qk_norm": "head", "output_gate": "element"}),
        ("gpt", {"sink": "learned", "qk_norm": "full", "output_gate": "head"}),
        ("llama", {"sink": "softmax1", "attention_softcap": 30.0}),
        ("llama", {"norm": "dyt", "norm_position": "peri", "embedding_norm": True}),
        ("gpt", {"norm_position": "post", "embedding_norm": True}),
        ("llama", {"norm_position": "reordered", "logit_softcap": 30.0}),
    ],
    ids=[
        *("llama", "llama-gqa-relu2", "gpt-dropout", "gpt-relu", "llama-kv_bias", "gpt-learned", "llama-softmax1"),
        *("llama-dyt-peri", "gpt-post", "llama-reordered-softcap"),
    ],
)
def test_the_estimate_is_what_a_forward_keeps(arch: str, model: dict[str, Any], recompute: str, precision: str) -> None:
    precision_section = {"bf16": {"enabled": True}} if precision == "bf16" else {}
    config = small_config(1, arch, {**LLAMA, **model}, parallel={"recompute": recompute}, **precision_section)
    estimate = plan(config).stages[0].activations
    assert estimate.per_micro_batch == pytest.approx(kept_for_backward(config), rel=0.15)


@pytest.mark.parametrize(
    ("changes", "streams"),
    [
        ({"norm_position": "peri"}, 4 * 2),
        ({"norm_position": "reordered"}, 0),
        ({"norm_position": "post"}, -1),
        ({"embedding_norm": True}, 1),
    ],
    ids=["peri", "reordered", "post", "embedding_norm"],
)
def test_a_norm_more_keeps_its_input(changes: dict[str, Any], streams: int) -> None:
    """4 blocks; DyT keeps its input and nothing else, so that the difference is exact."""
    plain, changed = (small_config(1, "llama", {**LLAMA, "norm": "dyt", **extra}) for extra in ({}, changes))
    planned = [plan(config).stages[0].activations.per_micro_batch for config in (plain, changed)]
    kept = [kept_for_backward(config) for config in (plain, changed)]
    assert planned[1] - planned[0] == kept[1] - kept[0] == streams * plain.micro_batch * 64 * 128 * 4


@pytest.mark.parametrize(("tensor", "sequence", "kv_heads"), [(2, False, 2), (2, True, 1)], ids=["tp2", "tp2-sp-shared-kv"])
def test_the_estimate_holds_on_tensor_parallel_ranks(tensor: int, sequence: bool, kv_heads: int) -> None:
    arguments = {"model": {**LLAMA, "num_kv_heads": kv_heads}, "parallel": {"tensor": tensor, "sequence": sequence}}
    estimate = plan(small_config(tensor, **arguments)).stages[0].activations.per_micro_batch  # type: ignore[arg-type]
    for kept in run_ranks(tensor, kept_on_a_rank, arguments):
        assert estimate == pytest.approx(kept, rel=0.15)


SHARED: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "cp2": {"parallel": {"context": 2}},
        "cp2 bf16, one sample": {"parallel": {"context": 2}, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}},
        "cp2 gpt": {"arch": "gpt", "parallel": {"context": 2}},
        "cp2 one kv head, normed and gated": {
            "model": {"num_kv_heads": 1, "qk_norm": "full", "output_gate": "element"}, "parallel": {"context": 2},
        },
        "cp2 normed by head": {"model": {"qk_norm": "head", "sink": "learned"}, "parallel": {"context": 2}},
        "cp2 selective": {"parallel": {"context": 2, "recompute": "selective"}},
        "cp2 full": {"parallel": {"context": 2, "recompute": "full"}},
    },
    4: {
        "tp2 cp2 sp": {"parallel": {"tensor": 2, "sequence": True, "context": 2}},
        "cp4 one kv head": {"model": {"num_kv_heads": 1}, "parallel": {"context": 4}},
    },
}  # fmt: skip


@pytest.mark.parametrize("world", SHARED)
def test_the_estimate_holds_where_ranks_share_a_sequence(world: int) -> None:
    cases, wrong = SHARED[world], {}
    seen = run_ranks(world, all_kept_on_a_rank, [{**case, "model": {**LLAMA, **case.get("model", {})}} for case in cases.values()])
    for i, (name, case) in enumerate(cases.items()):
        estimate = plan(small_config(world, **{**case, "model": {**LLAMA, **case.get("model", {})}})).stages[0].activations.per_micro_batch
        for kept in (rank[i] for rank in seen):
            # What is small and not counted (views' bookkeeping, a loss's scalars) is a few per cent of so small a model at most.
            if estimate != pytest.approx(kept, rel=0.05):
                wrong[name] = (estimate, kept)
    assert not wrong  # estimated, kept


def test_more_recompute_keeps_less() -> None:
    kept = [plan(small_config(parallel={"recompute": r})).stages[0].activations.per_micro_batch for r in ("none", "selective", "full")]
    assert kept[0] > kept[1] > kept[2]


def test_early_stages_hold_more_micro_batches() -> None:
    config = small_config(4, model={"num_layers": 8}, parallel={"pipeline": 4}, gradient_accumulation_steps=8)
    assert [stage.activations.in_flight for stage in plan(config).stages] == [4, 3, 2, 1]
    few = small_config(4, model={"num_layers": 8}, parallel={"pipeline": 4}, gradient_accumulation_steps=2)
    assert [stage.activations.in_flight for stage in plan(few).stages] == [2, 2, 2, 1]


def test_sequence_parallel_cuts_the_residual_stream() -> None:
    whole, sliced = (plan(small_config(2, parallel={"tensor": 2, "sequence": s})).stages[0].activations for s in (False, True))
    tokens, norms = 2 * 32, 9  # two a block and the last; each keeps its input, its output and one fp32 number a token
    assert whole.per_micro_batch - sliced.per_micro_batch == norms * (2 * 64 + 1) * 4 * tokens / 2
