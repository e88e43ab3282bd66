from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megastab.config.errors import UserError
from megastab.config.load import load_config
from megastab.plan.parameters import stages
from megastab.plan.plan import plan
from megastab.plan.text import render
from megastab.plan.units import amount, flops, size, table
from megastab.wrappers.choice import wrapper_name
from tests.unit.plan.jobs import small_config

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs").rglob("*.json"))
LLAMA_7B = ROOT / "configs" / "llama_7b.json"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_has_a_plan_whose_parameters_add_up(path: Path) -> None:
    parallel = json.loads(path.read_text())["megastab"]["parallel"]
    config = load_config(path, world_size=parallel["tensor"] * parallel["pipeline"])
    model, made = config.megastab.model, plan(config)
    alone = stages(model, replace(config.layout, world=1, tensor=1, pipeline=1, data=1))
    assert made.parameters == alone[0].elements == sum(group.parameters for group in made.groups)
    assert len(made.stages) == config.layout.pipeline


def test_a_seven_billion_model_is_one() -> None:
    made = plan(load_config(LLAMA_7B, world_size=64))
    assert made.parameters == pytest.approx(6.74e9, rel=0.001)  # LLaMA 7B, arXiv 2302.13971
    # 6 N per token is the usual estimate; attention over 4096 positions adds to it.
    assert 1.0 < made.flops_per_token / (6 * made.parameters) < 1.1
    assert made.tokens == 120_000 * 1024 * 4096


def test_bubble_is_the_share_of_a_step_a_stage_waits() -> None:
    assert plan(small_config()).bubble == 0
    made = plan(small_config(4, model={"num_layers": 4}, parallel={"pipeline": 4}, gradient_accumulation_steps=9))
    assert made.bubble == pytest.approx(3 / 12)


def test_stages_hold_every_layer_once() -> None:
    made = plan(small_config(2, model={"num_layers": 5}, parallel={"pipeline": 2}))
    assert [stage.layers for stage in made.stages] == ["embedding, blocks 0-2", "blocks 3-4, head"]


def test_a_tied_matrix_is_held_at_both_ends() -> None:
    cut = plan(small_config(2, "gpt", parallel={"pipeline": 2}))
    whole = plan(small_config(1, "gpt"))
    assert whole.stages[0].parameters == whole.parameters
    assert sum(stage.parameters for stage in cut.stages) == whole.parameters + 512 * 64  # 500 rows padded to 512


def test_decay_groups_are_told() -> None:
    decayed, rest = plan(small_config()).groups
    assert (decayed.decay, decayed.what) == (0.1, "matrices and embeddings")
    assert (rest.decay, rest.what, rest.parameters) == (0.0, "norms and biases", 9 * 64)
    (alone,) = plan(small_config(optimizer={"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0}})).groups
    assert (alone.what, alone.decay) == ("all parameters", 0.0)


@pytest.mark.parametrize(
    ("precision", "stage", "offload", "name"),
    [
        ("fp32", 0, False, "none (torch optimizer)"),
        ("bf16", 1, False, "BF16_Optimizer"),
        ("bf16", 1, True, "DeepSpeedZeroOptimizer (stage 1)"),
        ("fp16", 1, False, "DeepSpeedZeroOptimizer (stage 1)"),
        ("bf16", 2, False, "DeepSpeedZeroOptimizer (stage 2)"),
        ("fp32", 3, False, "DeepSpeedZeroOptimizer_Stage3"),
    ],
)
def test_wrapper_is_the_one_deepspeed_chooses(precision: str, stage: int, offload: bool, name: str) -> None:
    assert wrapper_name(precision, stage, offload) == name


def test_the_peak_is_the_larger_of_two_moments() -> None:
    stage = plan(small_config(zero_optimization={"stage": 1})).stages[0]
    held = stage.states.weights + stage.states.masters + stage.states.moments + stage.states.gradients
    assert stage.peak == held + stage.activations.peak + stage.states.buckets
    at_step = replace(stage, states=replace(stage.states, step_workspace=10**9))
    assert at_step.peak == held + 10**9


def test_the_page_says_what_matters() -> None:
    config = small_config(4, parallel={"tensor": 2, "pipeline": 2, "sequence": True}, bf16={"enabled": True})
    page = render(plan(config))
    for said in (
        "4 ranks = tensor 2 x pipeline 2 x data 1, sequence parallel",
        "bf16, ZeRO 1, DeepSpeed wrapper: BF16_Optimizer; AdamW",
        "8 samples = micro-batch 2 x accumulation 4 x data 1",
        "20.0 % of a step",
        "activations (estimate)",
        "stage 1: block",
        "zero_optimization.stage = 1: 16-bit weights without ZeRO",
    ):
        assert said in page
    assert all(completion.reason in page for completion in config.completions)


def test_the_page_says_who_shares_sequences() -> None:
    bf16 = {"bf16": {"enabled": True}}
    made = plan(small_config(4, parallel={"tensor": 2, "context": 2}, **bf16))
    assert "4 ranks = tensor 2 x context 2 x pipeline 1 x data 1" in render(made)
    assert made.to_json()["layout"]["context"] == 2
    # Two copies of the weights either way.
    assert made.stages[0].states == plan(small_config(4, parallel={"tensor": 2}, **bf16)).stages[0].states
    assert "context" not in render(plan(small_config(2)))


def test_json_holds_plain_values() -> None:
    made = plan(small_config(2, parallel={"pipeline": 2}))
    again = json.loads(json.dumps(made.to_json()))
    assert again["stages"][1]["peak"] == made.stages[1].peak
    assert again["flops_per_step"] == made.flops_per_token * made.tokens_per_step
    assert {"key", "value", "reason"} <= again["completions"][0].keys()


def test_an_unknown_vocabulary_is_told(tmp_path: Path) -> None:
    config = small_config(model={"vocab_size": None})
    with pytest.raises(UserError, match="both null"):
        plan(config)
    missing = config.megastab.model_copy(update={"data": config.megastab.data.model_copy(update={"tokenizer": str(tmp_path / "no.model")})})
    with pytest.raises(UserError, match="or plan with megastab.model.vocab_size=N"):
        plan(replace(config, megastab=missing))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_command_plans_without_torch() -> None:
    done = run("tools/plan.py", str(LLAMA_7B), "--world-size", "64", "megastab.parallel.tensor=8")
    assert done.returncode == 0, done.stderr
    assert "64 ranks = tensor 8 x pipeline 2 x data 4" in done.stdout
    code = "import sys; from megastab.config.load import load_config; from megastab.plan.plan import plan; "
    code += "from megastab.plan.text import render; "
    code += f"render(plan(load_config({str(LLAMA_7B)!r}, world_size=8))); assert not {{'torch', 'deepspeed', 'numpy'}} & sys.modules.keys()"
    assert run("-c", code).returncode == 0


def test_the_command_prints_json_and_user_errors() -> None:
    done = run("tools/plan.py", str(LLAMA_7B), "--world-size", "8", "--json")
    assert json.loads(done.stdout)["layout"]["world"] == 8
    wrong = run("tools/plan.py", str(LLAMA_7B), "--world-size", "7")
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: ") and "Traceback" not in wrong.stderr


@pytest.mark.parametrize(
    ("function", "number", "text"),
    [
        (size, 0, "0"),
        (size, 512, "512 B"),
        (size, 1536, "1.50 KiB"),
        (size, 15.25 * 2**30, "15.2 GiB"),
        (size, 300 * 2**20, "300 MiB"),
        (size, 5000 * 2**40, "5000 TiB"),
        (amount, 950, "950"),
        (amount, 6_738_415_616, "6.74 B"),
        (amount, 124_400_000, "124 M"),
        (flops, 4.21e16, "42.1 PFLOP"),
        (flops, 2.0e7, "20.0 MFLOP"),
    ],
)
def test_numbers_as_people_read_them(function: Any, number: float, text: str) -> None:
    assert function(number) == text


def test_columns_line_up() -> None:
    assert table([["", "a"], ["long", "10"]], indent="") == ["       a", "long  10"]
