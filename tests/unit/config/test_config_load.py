from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megastab.config.errors import UserError
from megastab.config.load import load_config

CONFIGS = sorted(Path(__file__).parents[3].joinpath("configs").rglob("*.json"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 3}, (24, 3, 4)),
        ({"train_batch_size": 24, "gradient_accumulation_steps": 4}, (24, 3, 4)),
        ({"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 4}, (24, 3, 4)),
        ({"train_batch_size": 24}, (24, 12, 1)),
        ({"train_micro_batch_size_per_gpu": 3}, (6, 3, 1)),
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 4}, (24, 3, 4)),
    ],
    ids=["no accumulation", "no micro", "no train", "train alone", "micro alone", "all"],
)
def test_batch_sizes_are_completed_as_deepspeed_does(base, given: dict[str, int], expected: tuple[int, int, int]) -> None:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    base = {key: value for key, value in base.items() if key not in keys} | given
    config = load_config(base, ["megastab.parallel.tensor=2", "megastab.parallel.pipeline=2"], world_size=8)  # dp 2
    assert (config.global_batch, config.micro_batch, config.accumulation) == expected
    assert tuple(config.deepspeed[key] for key in keys) == expected


@pytest.mark.parametrize(
    ("overrides", "world", "said"),
    [
        (
            ["train_batch_size=18", "train_micro_batch_size_per_gpu=4"],
            1,
            "fit is train_batch_size = 16, or train_micro_batch_size_per_gpu = 3.",
        ),
        (
            ["train_batch_size=18", "train_micro_batch_size_per_gpu=4", "gradient_accumulation_steps=3"],
            1,
            "train_batch_size = 12, or train_micro_batch_size_per_gpu = 3 with gradient_accumulation_steps = 6.",
        ),
        (["gradient_accumulation_steps=5"], 2, "fit is train_batch_size = 20, or gradient_accumulation_steps = 4."),
        (["train_micro_batch_size_per_gpu=null", "gradient_accumulation_steps=3"], 2, "fit is train_batch_size = 18."),
        (["train_batch_size=50", "train_micro_batch_size_per_gpu=8"], 4, "fit is train_batch_size = 64."),
        (["train_micro_batch_size_per_gpu=null"], 3, "fit is train_batch_size = 15."),
    ],
)
def test_batch_sizes_that_do_not_fit_name_the_numbers_and_the_nearest_fit(refuse, overrides: list[str], world: int, said: str) -> None:
    message = refuse(*overrides, world=world)
    assert said in message
    assert f"data-parallel ranks = {world} (world {world} / tensor 1 / pipeline 1)" in message
    for key in ("train_batch_size = ", "train_micro_batch_size_per_gpu = ", "gradient_accumulation_steps = "):
        assert key in message


def test_batch_sizes_are_needed_and_whole(refuse) -> None:
    assert "train_batch_size or train_micro_batch_size_per_gpu is missing" in refuse(
        "train_batch_size=null", "train_micro_batch_size_per_gpu=null", "gradient_accumulation_steps=2"
    )
    assert "train_batch_size = 0 must be a whole number" in refuse("train_batch_size=0")
    assert "gradient_accumulation_steps = 1.5 must be a whole number" in refuse("gradient_accumulation_steps=1.5")


def test_layout_is_what_remains_and_must_divide(load, refuse) -> None:
    layout = load("megastab.parallel.tensor=2", "megastab.parallel.pipeline=2", world=8).layout
    assert (layout.world, layout.tensor, layout.pipeline, layout.data) == (8, 2, 2, 2)
    message = refuse("megastab.parallel.tensor=4", world=6)
    for words in ("megastab.parallel.tensor = 4", "does not divide the 6 ranks", "--num_gpus 8"):
        assert words in message


def test_world_comes_from_the_launcher(base, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config(base).layout.world == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert load_config(base).layout.data == 4
    assert load_config(base, world_size=2).layout.data == 2
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(UserError, match="WORLD_SIZE = 'many'"):
        load_config(base)
    with pytest.raises(UserError, match="number of ranks is 0"):
        load_config(base, world_size=0)


def test_facts_are_derived(load) -> None:
    config = load("bf16.enabled=true", "optimizer.type=adamw", "zero_optimization.stage=2")
    assert (config.precision, config.zero_stage, config.micro_batch, config.accumulation) == ("bf16", 2, 2, 8)
    assert (config.global_batch, config.tokens_per_step, config.total_steps, config.warmup_steps) == (16, 512, 100, 0)
    assert (config.learning_rate, config.optimizer_type) == (1e-3, "AdamW")
    assert config.optimizer_params == {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    assert load("fp16.enabled=true").precision == "fp16"
    assert load().precision == "fp32"


@pytest.mark.parametrize(("tokens", "steps"), [(5120, 10), (5121, 11), (5119, 10)])
def test_tokens_become_steps_rounded_up(load, tokens: int, steps: int) -> None:
    config = load("megastab.run.total_steps=null", f"megastab.run.total_tokens={tokens}", f"megastab.schedule.warmup_tokens={tokens - 600}")
    assert config.total_steps == steps
    assert config.warmup_steps == -(-(tokens - 600) // 512)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("bf16.enabled=true", "tensorboard.enabled=true", "csv_monitor.enabled=true", "csv_monitor.job_name=a"),
        (
            "megastab.model.arch=gpt",
            "megastab.model.ffn_hidden_size=null",
            "megastab.run.total_steps=null",
            "megastab.run.total_tokens=9999",
        ),
        ('megastab.data.train=[[1, "a"], [0.5, "b"]]', "fp16.enabled=true", "zero_optimization.stage=3"),
        ("megastab.parallel.tensor=2", "megastab.parallel.pipeline=2", "megastab.parallel.sequence=true"),
    ],
)
def test_resolved_config_is_json_and_loads_to_an_equal_config(load, overrides: tuple[str, ...]) -> None:
    config = load(*overrides, world=4)
    again = load_config(json.loads(json.dumps(config.resolved())), world_size=4)
    assert again == config
    assert again.resolved() == config.resolved()
    assert again.completions == ()


def test_configs_that_train_differently_are_unequal(load) -> None:
    assert load() == load()
    assert load() != load("megastab.run.seed=1")
    assert load() != load("gradient_clipping=0.5")
    assert load() != load(world=2)


def test_zero_betas_are_legal(load) -> None:
    assert load("optimizer.params.betas=[0, 0]").optimizer_params["betas"] == (0, 0)


def test_deepspeeds_part_is_without_our_block(load) -> None:
    assert "megastab" not in load().deepspeed


def test_vocabulary_is_filled_from_the_tokenizer(load) -> None:
    config = load("megastab.model.vocab_size=null")
    assert config.megastab.model.vocab_size is None
    named = config.with_vocab(777)
    assert named.megastab.model.vocab_size == 777
    assert named.with_vocab(777) == named
    assert config.megastab.model.vocab_size is None
    with pytest.raises(UserError, match=r"megastab\.model\.vocab_size = 777, but the tokenizer .* has 778 entries: set vocab_size to 778"):
        named.with_vocab(778)


def test_vocabulary_from_the_tokenizer_obeys_the_rule(load) -> None:
    heads = ("megastab.model.num_heads=6", "megastab.model.num_kv_heads=3", "megastab.model.hidden_size=60")
    config = load("megastab.model.vocab_size=null", "megastab.parallel.tensor=3", *heads, world=3)
    with pytest.raises(UserError, match=r"padded to 1024"):
        config.with_vocab(1000)
    assert config.with_vocab(380).megastab.model.vocab_size == 380  # 384 rows = 3 x 128


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_loads_and_resolves(path: Path) -> None:
    parallel = json.loads(path.read_text())["megastab"]["parallel"]
    for data in (1, 2):
        world = parallel["tensor"] * parallel["pipeline"] * data
        config = load_config(path, world_size=world)
        assert config.layout.data == data
        assert load_config(config.resolved(), world_size=world) == config
        assert config.megastab.run.dir.startswith("runs/")
        assert config.warmup_steps < config.total_steps


def test_the_promised_configs_are_shipped() -> None:
    assert {path.stem for path in CONFIGS} >= {
        "quickstart",
        "gpt2_124m",
        "llama_60m",
        "llama_130m",
        "llama_130m_quant",
        "llama_350m",
        "llama_1b",
        "llama_7b",
    }


HYBRIDS = ("baseline", "kv_bias", "dyt", "tvr", "kv_bias_tvr", "dyt_tvr")


@pytest.mark.parametrize("hybrid", HYBRIDS)
@pytest.mark.parametrize("size", ["llama_1b", "llama_2m"])
def test_hybrids_differ_in_what_their_names_say(size: str, hybrid: str) -> None:
    def read(name: str) -> dict[str, Any]:
        path = next(path for path in CONFIGS if path.stem == f"{size}_{name}")
        return load_config(path, world_size=1).megastab.model_dump(mode="json")

    made, base = read(hybrid), read("baseline")
    assert made["run"].pop("dir") == f"runs/hybrids/{size}_{hybrid}" and base["run"].pop("dir")
    assert (made["model"].pop("norm") == "dyt") == ("dyt" in hybrid) and base["model"].pop("norm") == "rmsnorm"
    assert (made["model"].pop("sink") == "kv_bias") == ("kv_bias" in hybrid) and base["model"].pop("sink") == "none"
    tvr = made["stability"].pop("tvr")
    assert (tvr is not None) == ("tvr" in hybrid) and base["stability"].pop("tvr") is None
    if size == "llama_1b" and "dyt" in hybrid:  # arXiv 2503.22329: the DyT runs start from .02, and TVR holds them there
        assert (made["model"].pop("init")["std"], base["model"].pop("init")["std"]) == (0.02, 0.006)
        assert tvr is None or tvr["target_std"] == 0.02
    assert made == base


def test_loading_imports_neither_torch_nor_deepspeed() -> None:
    program = (
        "import sys, megastab; early = set(sys.modules)\n"
        "megastab.load_config(sys.argv[1], world_size=2).resolved()\n"
        "heavy = {'torch', 'deepspeed', 'megatron', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert 'pydantic' not in early\n"
    )
    path = next(path for path in CONFIGS if path.stem == "quickstart")
    subprocess.run([sys.executable, "-c", program, str(path)], check=True, timeout=60, cwd=path.parents[1])


def test_samples_to_skip_are_ranges(load, refuse) -> None:
    assert load("megastab.data.skip=[[3, 9], [0, 0]]").megastab.data.skip == [(3, 9), (0, 0)]
    assert "megastab.data: skip holds [9, 3], which ends before it begins: write [3, 9]" in refuse("megastab.data.skip=[[9, 3]]")
    assert "megastab.data.skip.0.0 = -1" in refuse("megastab.data.skip=[[-1, 3]]")
