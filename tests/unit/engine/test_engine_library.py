"""The library form on a transformers LLaMA nobody here wrote: equal to a plain PyTorch loop with the pure rules, at every ZeRO stage."""

from __future__ import annotations

import logging
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import megastab
from megastab.config.errors import UserError
from megastab.parallel import foreign
from megastab.stability.zclip import ZClip
from tests import jobs
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[3]
STEPS, LOOK, SPIKE, BATCH, SEQ, VOCAB = 7, 4, 6, 8, 16, 64
ZCLIP: dict[str, Any] = {"warmup_steps": 4}
TVR: dict[str, Any] = {"target_std": 0.02, "interval_steps": LOOK}
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1}
BLOCK = {"stability": {"zclip": ZCLIP, "tvr": TVR}}
MATRICES = 2 * 7
CASES = [(stage, dtype) for stage in (1, 2, 3) for dtype in ("fp32", "bf16")]


def config_of(stage: int, dtype: str) -> dict[str, Any]:
    """Two ranks, two micro-batches each."""
    config: dict[str, Any] = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // 4,
        "optimizer": {"type": "AdamW", "params": ADAMW},
        "zero_optimization": {"stage": stage},
        "megastab": BLOCK,
    }
    return config if dtype == "fp32" else {**config, dtype: {"enabled": True}}


# -- on the ranks --------------------------------------------------------------------------------------------------------


def llama(seed: int = 0) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=SEQ, initializer_range=0.08, **shape))


def batch_of(step: int) -> torch.Tensor:
    return torch.randint(VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(step))


def factor_of(step: int) -> float:
    return 20.0 if step == SPIKE else 1.0


def plain_loop() -> dict[str, Any]:
    """One process, plain PyTorch, the pure ZClip and TVR by hand."""
    model = llama()
    groups = [[p for p in model.parameters() if (p.dim() > 1) == is_matrix] for is_matrix in (True, False)]
    given = {**ADAMW, "betas": tuple(ADAMW["betas"])}
    optimizer = torch.optim.AdamW([{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}], **given)
    rule, tvr = ZClip(**ZCLIP), megastab.TVR(**TVR)
    matrices = {name: p.data for name, p in model.named_parameters() if name.endswith("_proj.weight")}
    norms, scales, actions = [], [], []
    for step in range(1, STEPS + 1):
        tokens = batch_of(step)
        optimizer.zero_grad()
        (model(input_ids=tokens, labels=tokens).loss * factor_of(step)).backward()
        gradients = [p.grad for p in model.parameters()]
        norms.append(float(torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()))
        decision = rule.observe(norms[-1])
        scales.append(decision.scale)
        actions.append(decision.action)
        torch._foreach_mul_(gradients, decision.scale)
        optimizer.step()
        if tvr.advance():
            tvr.rescale_(matrices)
    weights = {name.removesuffix(".weight"): p.detach().flatten().numpy().copy() for name, p in model.named_parameters()}
    return {"norms": norms, "scales": scales, "actions": actions, "weights": weights}


def take_step(engine: Any, step: int, factor: float | None = None) -> Any:
    """One optimizer step of two micro-batches; its record."""
    before = engine.stability.last
    for tokens in batch_of(step).chunk(2)[engine.global_rank].chunk(2):
        assert engine.stability.last is before, "a micro-batch is no step"
        engine.backward(engine(input_ids=tokens, labels=tokens).loss * (factor_of(step) if factor is None else factor))
        engine.step()
    return engine.stability.last


def masters(engine: Any) -> list[jobs.Piece]:
    return [jobs.piece(f, f.master) for f in engine.stability.adapter.fragments()]


def low_is_rounded_master(engine: Any) -> bool:
    return all(torch.equal(f.low, f.master.to(f.low.dtype)) for f in engine.stability.adapter.fragments())


def train(stage: int, dtype: str, folder: str) -> dict[str, Any]:
    """Train, save in the middle, go on; then another engine goes on from the checkpoint."""
    model = llama()
    engine, optimizer, loader, _ = megastab.initialize(model=model, model_parameters=model.parameters(), config=config_of(stage, dtype))
    facts: dict[str, Any] = {"records": [], "low": [], "wrapper": type(optimizer).__name__, "first": engine.stability.last}
    where = f"{folder}/{stage}-{dtype}"
    for step in range(1, STEPS + 1):
        facts["records"].append(take_step(engine, step))
        facts["low"].append(low_is_rounded_master(engine))
        if step == LOOK:
            facts["looked"] = masters(engine)
            facts["saved"] = engine.stability.state_dict()
            engine.save_checkpoint(where, client_state={"mine": [7, 8]})
    facts["final"] = masters(engine)
    facts["bad"] = take_step(engine, 1, math.nan)
    engine.destroy()
    return facts | resume(stage, dtype, where)


def resume(stage: int, dtype: str, where: str) -> dict[str, Any]:
    engine, *_ = megastab.initialize(model=llama(seed=1), config=config_of(stage, dtype))
    fresh = engine.stability.state_dict()
    nothing = engine.load_checkpoint(f"{where}-missing")
    _, client = engine.load_checkpoint(where)
    facts = {"fresh": fresh, "nothing": nothing, "client": client, "loaded": engine.stability.state_dict()}
    facts["resumed"] = [take_step(engine, step) for step in range(LOOK + 1, STEPS + 1)]
    engine.load_checkpoint(where, load_module_only=True)
    facts["weights_only"] = engine.stability.state_dict()["clip"]["num_nonfinite"], engine.stability.state_dict()["tvr"]
    engine.destroy()
    return facts


def attached() -> dict[str, Any]:
    """The same run on an engine deepspeed.initialize built; its JSON holds our block and no gradient_clipping."""
    import deepspeed

    model = llama()
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1]}, {"params": [p for p in model.parameters() if p.dim() == 1]}]
    groups[1]["weight_decay"] = 0.0  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(groups, **{**ADAMW, "betas": tuple(ADAMW["betas"])})
    config = {**config_of(1, "fp32"), "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    controller = megastab.attach(engine)
    facts: dict[str, Any] = {"is_it": controller is engine.stability}
    facts["records"] = [take_step(engine, step) for step in range(1, STEPS + 1)]
    try:
        engine.save_checkpoint("nowhere", client_state={"megastab": 1})
    except UserError as error:
        facts["taken"] = str(error)
    try:
        megastab.attach(engine)
    except UserError as error:
        facts["twice"] = str(error)
    engine.destroy()
    return facts


def gpt2() -> dict[str, Any]:
    """A model whose matrices the table does not know: what is said, and what TVR touches before and after a mapping."""
    from transformers import GPT2Config, GPT2LMHeadModel

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megastab").addHandler(handler)
    looks = []
    for mapped in (None, r"attn\.c_proj"):
        if mapped:
            foreign.register(mapped, "o")
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=SEQ, n_embd=32, n_layer=2, n_head=4, initializer_range=0.08))
        engine, *_ = megastab.initialize(
            model=model,
            model_parameters=[{"params": list(model.parameters()), "lr": 1e-4}],
            config={**config_of(0, "fp32"), "megastab": {"stability": {"tvr": {**TVR, "interval_steps": 1}}}},
        )
        record = take_step(engine, 1)
        looks.append([event.name for event in engine.stability.rescaled])
        engine.destroy()
    return {"said": said, "looks": looks, "lr": record.lr, "threshold": record.clip_threshold}


def pipelined() -> dict[str, Any]:
    """Somebody's PipelineModule of two stages beside the same layers on one process."""
    from deepspeed.pipe import PipelineModule

    def layers() -> list[nn.Module]:
        torch.manual_seed(0)
        return [nn.Linear(8, 8) for _ in range(4)]

    def batches() -> Any:
        draw = torch.Generator().manual_seed(0)
        while True:
            yield torch.randn(4, 8, generator=draw), torch.randn(4, 8, generator=draw)

    foreign.register(r"^\d+\.weight$", "up")
    config = {**config_of(0, "fp32"), "train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    config["megastab"] = {"stability": {"zclip": ZCLIP, "tvr": {**TVR, "interval_steps": 1, "target_std": 0.1}}}
    engine, *_ = megastab.initialize(model=PipelineModule(layers(), num_stages=2, loss_fn=nn.functional.mse_loss), config=config)
    data, records = batches(), []
    for _ in range(3):
        engine.train_batch(data)
        records.append(engine.stability.last)
    plain, data, norms, rescaled = nn.Sequential(*layers()), batches(), [], []
    optimizer, tvr = torch.optim.SGD(plain.parameters(), lr=0.1), megastab.TVR(target_std=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        for x, y in (next(data), next(data)):
            (nn.functional.mse_loss(plain(x), y) / 2).backward()
        norms.append(float(torch.stack([p.grad.norm() for p in plain.parameters()]).norm()))
        optimizer.step()
        rescaled.append(len(tvr.rescale_({name: p.data for name, p in plain.named_parameters() if name.endswith("weight")})))
    return {"records": records, "norms": norms, "rescaled": rescaled}


def collect(folder: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"plain": plain_loop(), "attached": attached(), "gpt2": gpt2()}
    facts |= {case: train(*case, folder) for case in CASES}  # type: ignore[misc]
    return facts | {"pipelined": pipelined()}  # last: DeepSpeed keeps its grid for the whole process


# -- the tests -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return run_ranks(2, collect, str(tmp_path_factory.mktemp("library")))


each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"zero{case[0]}-{case[1]}")


@each_case
def test_norms_and_decisions_are_those_of_a_plain_loop(ranks: list[dict[Any, Any]], case: Any) -> None:
    """1e-5: AdamW amplifies the order of summation; bf16 5e-2: three digits in every gradient. The spike and the rescaling are past."""
    plain = ranks[0]["plain"]
    for rank in ranks:
        records = rank[case]["records"]
        assert [r.grad_norm for r in records] == pytest.approx(plain["norms"], rel=1e-5 if case[1] == "fp32" else 5e-2)
        if case[1] == "fp32":
            assert [r.action for r in records] == plain["actions"]
            assert [r.clip_scale for r in records] == pytest.approx(plain["scales"], rel=1e-4)
        assert records[SPIKE - 1].action == "clip" and records[SPIKE - 1].z > 2.5
        rule = ZClip(**ZCLIP)
        for record in records:
            decision = rule.observe(record.grad_norm)
            assert (record.clip_threshold, record.clip_scale, record.z, record.action, record.reason) == (
                (decision.threshold, decision.scale, decision.z, decision.action, decision.reason)
            )


@each_case
def test_records_tell_the_step(ranks: list[dict[Any, Any]], case: Any) -> None:
    for rank in ranks:
        records = rank[case]["records"]
        assert rank[case]["first"] is None
        assert [r.step for r in records] == list(range(1, STEPS + 1))
        assert all(math.isnan(r.loss) and r.tokens == 0 and r.seconds > 0 and r.lr == ADAMW["lr"] for r in records)
        bad = rank[case]["bad"]
        assert (bad.step, bad.action, bad.grad_norm, bad.clip_scale) == (STEPS + 1, "skip", math.inf, 0.0)


@each_case
def test_tvr_rescales_the_seven_matrices_of_each_layer(ranks: list[dict[Any, Any]], case: Any) -> None:
    for rank in ranks:
        assert [r.rescaled for r in rank[case]["records"]] == [MATRICES if step == LOOK else 0 for step in range(1, STEPS + 1)]
        assert all(rank[case]["low"]), "every low-precision copy is its rounded master after every step"
    whole, drift = jobs.merge(rank[case]["looked"] for rank in ranks)
    rescaled = {name for name in whole if name.endswith("_proj")}
    assert drift == 0.0 and len(rescaled) == MATRICES and len(whole) == MATRICES + 2 * 2 + 3
    for name, values in whole.items():
        is_at_target = float(values.astype(np.float64).std(ddof=1)) == pytest.approx(TVR["target_std"], rel=1e-4)
        assert is_at_target == (name in rescaled), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_final_weights_are_those_of_a_plain_loop(ranks: list[dict[Any, Any]], stage: int) -> None:
    """1e-4 of the largest entry: the tolerance of the equivalence matrix for AdamW."""
    whole, _ = jobs.merge(rank[stage, "fp32"]["final"] for rank in ranks)
    plain = ranks[0]["plain"]["weights"]
    for name, values in whole.items():
        wanted = plain[name.removesuffix(".weight")]
        assert np.abs(values - wanted).max() <= 1e-4 * np.abs(wanted).max(), name


@each_case
def test_checkpoint_carries_the_controller_and_leaves_the_caller_alone(ranks: list[dict[Any, Any]], case: Any) -> None:
    for rank in ranks:
        facts = rank[case]
        assert facts["nothing"] == (None, None) or not facts["nothing"][1]
        assert facts["client"]["mine"] == [7, 8] and "megastab" not in facts["client"]
        assert facts["loaded"] == facts["saved"] != facts["fresh"]
        assert facts["saved"]["tvr"] == {"applied_steps": LOOK}
        for record, wanted in zip(facts["resumed"], facts["records"][LOOK:], strict=True):
            assert (record.step, record.action, record.rescaled) == (wanted.step, wanted.action, wanted.rescaled)
            assert record.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-6)
        assert facts["weights_only"] == (0, {"applied_steps": STEPS}), "weights alone leave the statistics of this run"


def test_attached_engine_does_the_same(ranks: list[dict[Any, Any]]) -> None:
    """Without gradient_clipping DeepSpeed would cap at 1.0: beside ZClip nobody asked for that."""
    plain = ranks[0]["plain"]
    assert max(plain["norms"]) > 1.0
    for rank in ranks:
        facts = rank["attached"]
        assert facts["is_it"] and "controller already" in facts["twice"] and 'client_state["megastab"]' in facts["taken"]
        assert [r.grad_norm for r in facts["records"]] == pytest.approx(plain["norms"], rel=1e-5)
        assert [r.action for r in facts["records"]] == plain["actions"]
        assert [r.rescaled for r in facts["records"]] == [MATRICES if step == LOOK else 0 for step in range(1, STEPS + 1)]


def test_fused_matrices_are_named_and_left_alone(ranks: list[dict[Any, Any]]) -> None:
    said = [line for line in ranks[0]["gpt2"]["said"] if "leaves alone" in line]
    assert len(said) == 2 and ranks[1]["gpt2"]["said"] == []
    assert all(f"transformer.h.*.{name}.weight (2)" in said[0] for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
    assert "foreign.register" in said[0] and "wte" not in said[0] and "attn.c_proj" not in said[1]
    for rank in ranks:
        assert rank["gpt2"]["looks"] == [[], [f"transformer.h.{layer}.attn.c_proj" for layer in range(2)]]
        assert rank["gpt2"]["lr"] == 1e-4, "the caller's groups are kept"
        assert rank["gpt2"]["threshold"] == 1.0, "the fixed clip of DeepSpeed's default, said aloud"


def test_foreign_pipeline_is_one_model(ranks: list[dict[Any, Any]]) -> None:
    for rank in ranks:
        facts, records = rank["pipelined"], rank["pipelined"]["records"]
        assert [r.grad_norm for r in records] == pytest.approx(facts["norms"], rel=1e-5)
        assert [(r.step, r.action) for r in records] == [(step, "apply") for step in (1, 2, 3)]
        assert [r.rescaled for r in records] == facts["rescaled"] and facts["rescaled"][0] == 4, "both stages' matrices"


def groups_of_a_foreign_layout() -> list[tuple[int, int, list[int] | None]]:
    """Grid of an engine with an mpu of two tensor-parallel ranks in a job of four."""
    from torch.distributed import get_process_group_ranks

    from megastab.engine.foreign_grid import grid_of
    from megastab.parallel.grid import Grid

    mpu = Grid.create(tensor=2).mpu()
    grid = grid_of(SimpleNamespace(mpu=mpu, data_parallel_group=mpu.get_data_parallel_group()))
    axes = (grid.tp, grid.dp, grid.pp, grid.model, grid.stage)
    return [(axis.rank, axis.size, axis.group and get_process_group_ranks(axis.group)) for axis in axes]


def test_grid_is_read_from_an_mpu() -> None:
    for rank, (tp, dp, pp, model, stage) in enumerate(run_ranks(4, groups_of_a_foreign_layout)):
        pair = [rank // 2 * 2, rank // 2 * 2 + 1]
        assert tp == model == (rank % 2, 2, pair) and dp == (rank // 2, 2, [rank % 2, rank % 2 + 2])
        assert pp == (0, 1, None) and stage == (rank, 4, [0, 1, 2, 3])


def example() -> subprocess.CompletedProcess[str]:
    code = (
        "import runpy, sys; runpy.run_path('tests/e2e/library_example.py', run_name='__main__'); "
        "print('megatron:', [m for m in sys.modules if m.split('.')[0] == 'megatron'])"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_example_learns_and_imports_no_megatron() -> None:
    done = example()
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 30 and losses[0] > 5 and losses[-1] < losses[0] - 1
    assert "rescaled 14" in done.stdout and "megatron: []" in done.stdout


def test_documented_example_is_the_one_that_runs() -> None:
    text = (ROOT / "docs" / "library.md").read_text()
    source = (ROOT / "tests" / "e2e" / "library_example.py").read_text()
    assert f"```python\n{source}```" in text
    assert len(source.splitlines()) <= 40
