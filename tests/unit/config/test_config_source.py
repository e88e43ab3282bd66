from __future__ import annotations

from pathlib import Path

import pytest

from megastab.config.errors import UserError
from megastab.config.load import load_config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{\n  "train_batch_size": 8,\n  "bf16" {}\n}', ["line 3 column 10", "is not valid JSON", "Expecting ':' delimiter"]),
        ('{"optimizer": {"type": "SGD", "params": {}, "type": "Adam"}}', ["run.json says 'type' twice in one section"]),
        ("[1, 2]", ["one JSON object", "not a list"]),
        ('{"gradient_clipping": Infinity}', ["Infinity", "not JSON", "finite number or null"]),
    ],
    ids=["syntax", "duplicate", "array", "infinity"],
)
def test_bad_file_names_itself_and_the_place(tmp_path: Path, text: str, said: list[str]) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path, world_size=1)
    for words in said:
        assert words in str(caught.value)
    if "Infinity" not in text:
        assert "run.json" in str(caught.value)


def test_missing_and_undecodable_files_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the config file .*absent\.json: No such file"):
        load_config(tmp_path / "absent.json")
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(UserError, match=r"latin\.json is not UTF-8 text"):
        load_config(str(tmp_path / "latin.json"))


def test_overrides_reach_both_owners(load) -> None:
    config = load("megastab.run.total_steps=20", "zero_optimization.stage=3", "train_batch_size=8", "optimizer.params.betas=[0.8, 0.9]")
    assert config.total_steps == 20
    assert config.zero_stage == 3
    assert config.global_batch == 8
    assert config.optimizer_params["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    ("text", "value"), [("runs/a=b", "runs/a=b"), ('"runs/c"', "runs/c"), ("runs/d e", "runs/d e")], ids=["path", "quoted", "space"]
)
def test_override_that_is_no_json_is_a_string(load, text: str, value: str) -> None:
    assert load(f"megastab.run.dir={text}").megastab.run.dir == value


def test_later_override_wins_and_null_sections_open(load, base) -> None:
    assert load("train_batch_size=4", "train_batch_size=8").global_batch == 8
    base["zero_optimization"] = None
    assert load_config(base, ["zero_optimization.stage=2"]).zero_stage == 2


def test_overrides_leave_the_callers_dict_alone(base) -> None:
    load_config(base, ["megastab.run.total_steps=3", "bf16.enabled=true"])
    assert base["megastab"]["run"]["total_steps"] == 100
    assert "bf16" not in base


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("megastab.run.total_steps", "cannot read the override"),
        ("=3", "cannot read the override"),
        ("megastab..run=3", "cannot read the override"),
        ("train_batch_size.x=1", "train_batch_size = 16 is not a section"),
        ("megastab.run.dir.name=1", 'megastab.run.dir = "runs/small" is not a section'),
        ("megastab.run.total_step=5", "Did you mean megastab.run.total_steps?"),
        ("zero_optimisation.stage=1", "Did you mean zero_optimization?"),
    ],
)
def test_bad_override_is_told(refuse, override: str, said: str) -> None:
    assert said in refuse(override)
