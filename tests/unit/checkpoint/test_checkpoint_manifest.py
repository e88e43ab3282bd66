"""What a checkpoint is of: read, checked, and refused with the fix."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megastab.checkpoint import manifest, store, weights
from megastab.checkpoint.manifest import Manifest
from megastab.config.errors import UserError
from megastab.config.load import load_config
from tests.layouts import LLAMA, SINGLE, Layout, config_of
from tests.oracle.models import build

HERE = Path("runs/x/checkpoints/step00000010")


def a_manifest(tokenizer: str | None = "abc") -> Manifest:
    return Manifest.of(load_config(config_of(SINGLE), world_size=1), 10, 120, tokenizer)


def test_manifest_survives_its_file(tmp_path: Path) -> None:
    a_manifest().write(tmp_path)
    assert Manifest.read(tmp_path) == a_manifest()


def test_manifest_may_hold_what_json_writes_otherwise(tmp_path: Path) -> None:
    replace(a_manifest(), stability={"by_layer": {10: 1.0, 9: float("nan")}, "pair": (1, 2)}).write(tmp_path)
    read = Manifest.read(tmp_path).stability
    assert list(read["by_layer"]) == ["10", "9"] and read["pair"] == [1, 2]


def test_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a megastab checkpoint .*set megastab.run.resume"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"step": 1}', '{"step": 1, "unknown": 2}'])
def test_damaged_manifest_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / manifest.FILE).write_text(text)
    with pytest.raises(UserError, match="is damaged .*an older checkpoint, or none"):
        Manifest.read(tmp_path)


def test_equal_manifests_fit_whatever_the_step() -> None:
    a_manifest().check(replace(a_manifest(), step=0, consumed=0), HERE)
    a_manifest().check(a_manifest(tokenizer=None), HERE)
    a_manifest(tokenizer=None).check(a_manifest(), HERE)


def test_every_difference_is_named() -> None:
    other = load_config(config_of(SINGLE, model__hidden_size=64, model__num_kv_heads=2), world_size=1)
    with pytest.raises(UserError, match="another model .*hidden_size 32 there, 64 here, num_kv_heads 4 there, 2 here"):
        a_manifest().check(Manifest.of(other, 0, 0), HERE)
    other = load_config(config_of(SINGLE, "SGD"), world_size=1)
    with pytest.raises(UserError, match="another optimizer .*type AdamW there, SGD here.*resume with the optimizer it was saved with"):
        a_manifest().check(Manifest.of(other, 0, 0), HERE)
    with pytest.raises(UserError, match="another tokenizer: set megastab.data.tokenizer"):
        a_manifest("abc").check(a_manifest("def"), HERE)


def ortho(**params: object) -> Manifest:
    return Manifest.of(load_config(config_of(SINGLE, "OrthoAdam", ds__optimizer__params=params), world_size=1), 0, 0)


@pytest.mark.parametrize(("key", "value", "said"), [("seed", 1, "seed 0 there, 1 here"), ("axes", "both", "axes last there, both here")])
def test_moments_of_another_rotation_are_refused_and_defaults_are_settings(key: str, value: object, said: str) -> None:
    ortho().check(ortho(seed=0, axes="last", rotation="hadamard", lr=1.0), HERE)
    with pytest.raises(UserError, match=rf"another optimizer \({said}\): its moments mean nothing here"):
        ortho().check(ortho(**{key: value}), HERE)


def test_another_layout_and_precision_is_no_fault_but_told() -> None:
    other = load_config(config_of(Layout(4, tp=2, sp=True, zero=1), dtype="bf16"), world_size=4)
    wanted = Manifest.of(other, 0, 0)
    a_manifest().check(wanted, HERE)
    said = "world 1 -> 4, tensor 1 -> 2, data 1 -> 2, zero_stage 0 -> 1, precision fp32 -> bf16, sequence False -> True"
    assert a_manifest().change_of_shape(wanted) == said and a_manifest().change_of_shape(a_manifest()) == ""


def test_checkpoint_from_before_ranks_shared_sequences_is_of_the_same_shape() -> None:
    old = a_manifest()
    del old.layout["context"]
    assert old.change_of_shape(a_manifest()) == ""
    shared = Manifest.of(load_config(config_of(Layout(2, cp=2)), world_size=2), 0, 0)
    assert shared.layout["context"] == 2 and old.change_of_shape(shared) == "world 1 -> 2, context 1 -> 2"
    assert shared.change_of_shape(a_manifest()) == "world 2 -> 1, context 2 -> 1"


def test_checkpoint_of_deepspeeds_states_is_refused_with_its_format(tmp_path: Path) -> None:
    old = {key: value for key, value in asdict(a_manifest()).items() if key not in ("optimizer", "scalars", "files")}
    (tmp_path / manifest.FILE).write_text(json.dumps({**old, "format": 1}))
    with pytest.raises(UserError, match="of format 1 .*this megastab reads 2.*weights folder can still be sampled from"):
        Manifest.read(tmp_path).check(a_manifest(), HERE)


def test_one_changed_digit_of_a_manifest_is_seen(tmp_path: Path) -> None:
    a_manifest().write(tmp_path)
    path = tmp_path / manifest.FILE
    path.write_text(path.read_text().replace('"consumed": 120', '"consumed": 121'))
    with pytest.raises(UserError, match="is damaged .*its checksum is another"):
        Manifest.read(tmp_path)


NEW_KEYS = ("dyt", "norm_position", "layer_norm_scaling", "embedding_norm", "embedding_multiplier", "qk_norm", "sink")
NEW_KEYS += ("output_gate", "attention_softcap", "logit_softcap")


def test_checkpoint_of_a_version_without_these_keys_resumes(tmp_path: Path) -> None:
    old = replace(a_manifest(), model={key: value for key, value in a_manifest().model.items() if key not in NEW_KEYS})
    old.write(tmp_path)
    Manifest.read(tmp_path).check(a_manifest(), HERE)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("norm", "dyt", "norm rmsnorm there, dyt here"),
        ("norm_position", "peri", "norm_position pre there, peri here"),
        ("layer_norm_scaling", True, "layer_norm_scaling False there, True here"),
        ("embedding_norm", True, "embedding_norm False there, True here"),
        ("embedding_multiplier", 8.0, "embedding_multiplier 1.0 there, 8.0 here"),
        ("sink", "kv_bias", "sink none there, kv_bias here"),
        ("logit_softcap", 30.0, "logit_softcap None there, 30.0 here"),
    ],
)
@pytest.mark.parametrize("is_old", [False, True], ids=["today's", "of a version without these keys"])
def test_another_variant_is_refused_by_its_key(key: str, value: object, said: str, is_old: bool) -> None:
    there, here = a_manifest(), Manifest.of(load_config(config_of(SINGLE, **{f"model__{key}": value}), world_size=1), 0, 0)
    if is_old:
        there = replace(there, model={key: value for key, value in there.model.items() if key not in NEW_KEYS})
    with pytest.raises(UserError, match=rf"is of another model \({said}\): train it in another megastab.run.dir"):
        there.check(here, HERE)


def test_key_of_a_newer_version_is_named() -> None:
    newer = replace(a_manifest(), model={**a_manifest().model, "mixture": 8})
    with pytest.raises(UserError, match="another model .*mixture 8 there, None here"):
        newer.check(a_manifest(), HERE)


def test_name_of_a_step_sorts() -> None:
    assert store.tag_of(25) == "step00000025" and sorted([store.tag_of(1000), store.tag_of(999)]) == [store.tag_of(999), store.tag_of(1000)]


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    small = {**LLAMA, "num_layers": 1}
    with pytest.raises(UserError, match="no weights in .*give the folder of one checkpoint"):
        weights.load_weights(build(small), tmp_path)
    save_file({"embedding": torch.zeros(256, 32)}, tmp_path / "pp00-tp00.safetensors", metadata={"starts": '{"embedding": 0}'})
    with pytest.raises(UserError, match="embedding has 256 rows, the model wants 128"):
        weights.load_weights(build(small), tmp_path)
    save_file({"embedding": torch.zeros(128, 32)}, tmp_path / "pp00-tp00.safetensors", metadata={"starts": '{"embedding": 0}'})
    with pytest.raises(UserError, match="lacks final_norm, head, "):
        weights.load_weights(build(small), tmp_path)


def test_pieces_merge_in_the_order_of_their_rows(tmp_path: Path) -> None:
    for name, start in (("a", 4), ("b", 0), ("c", 2)):
        rows = torch.arange(start, start + 2.0)
        save_file({"x": rows}, tmp_path / f"{name}.safetensors", metadata={"starts": f'{{"x": {start}}}'})
    assert dict(weights.merged_weights(tmp_path))["x"].tolist() == [0, 1, 2, 3, 4, 5]
