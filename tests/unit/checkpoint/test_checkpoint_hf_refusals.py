"""Hugging Face directories that cannot be imported: each is told in one sentence, with its key or tensor and the way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megastab.checkpoint.hf_config import read_model
from megastab.checkpoint.hf_export import bytes_of
from megastab.checkpoint.hf_import import import_model
from megastab.checkpoint.init_from import open_start
from megastab.config.errors import UserError
from megastab.config.schema import ModelConfig
from tests.hugging_face import LLAMA3, MODELS, a_model, save

Tensors = dict[str, Tensor]


@cache
def saved(name: str) -> Path:
    return save(a_model(name), Path(mkdtemp(prefix="hf-")))


def changed(tmp_path: Path, name: str = "llama 3", tensors: Callable[[Tensors], Any] | None = None, **config: Any) -> Path:
    """A copy of a model's directory with its tensors edited in place, or keys of its config written."""
    folder = Path(shutil.copytree(saved(name), tmp_path / "in"))
    if tensors is not None:
        held = load_file(folder / "model.safetensors")
        tensors(held)
        save_file(held, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **config}))
    return folder


def refused(folder: Path, said: str) -> None:
    """The import says ``said``, and leaves nothing behind."""
    out = folder.parent / "out"
    with pytest.raises(UserError, match=said):
        import_model(folder, out)
    assert not out.exists() and not out.with_name("out.partial").exists()


CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown": ("llama 3", {"model_type": "mixtral"}, r"'mixtral' is not one megastab can express: it knows llama, mistral, .*gpt2"),
    "no type": ("llama 3", {"model_type": None}, "model_type = None is not one"),
    "attention bias": ("llama 3", {"attention_bias": True}, "attention_bias = true, and ours has attention_bias = false only"),
    "mlp bias": ("llama 3", {"mlp_bias": True}, "mlp_bias = true, and ours"),
    "head width": ("llama 3", {"head_dim": 16}, "head_dim = 16 with 4 heads is not hidden_size = 32"),
    "activation": ("llama 3", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not one of silu"),
    "no width": ("llama 3", {"hidden_size": None}, "hidden_size is missing"),
    "no positions": ("mistral", {"max_position_embeddings": None, "sliding_window": 8}, "max_position_embeddings is missing"),
    "yarn": (
        "llama 3",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        "rope_scaling of type 'yarn': ours has llama3's, or none",
    ),
    "half scaling": ("llama 3", {"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "rope_scaling.low_freq_factor is missing"),
    "flat scaling": (
        "llama 3",
        {"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}},
        r"values no model can have: rope_scaling = .*low_freq_factor = 4 must be below high_freq_factor = 4",
    ),
    "partly rotary": ("llama 3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: ours turns whole heads"),
    "quantised": ("llama 3", {"quantization_config": {"quant_method": "gptq"}}, r"quantization_config \(gptq\): its weights are quantised"),
    "mixture": ("llama 3", {"num_local_experts": 8}, "num_local_experts = 8: a mixture of experts"),
    "own code": ("llama 3", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map: it brings model code of its own, which is not run"),
    "window": ("mistral", {"sliding_window": 16}, "sliding_window = 16 is below the context of 48 .*--max-seq-len 16"),
    "windows by layer": ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types names others than full_attention"),
    "window of Qwen": ("qwen3", {"use_sliding_window": True}, "use_sliding_window = true, and ours"),
    "scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = true, and ours"),
    "exact gelu": ("gpt2", {"activation_function": "gelu"}, "activation_function = 'gelu' is not one of"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_that_cannot_be_expressed_is_named(case: str, tmp_path: Path) -> None:
    name, change, said = CONFIGS[case]
    refused(changed(tmp_path, name, **change), said)


def test_all_is_told_at_once(tmp_path: Path) -> None:
    refused(changed(tmp_path, attention_bias=True, hidden_act="gelu"), r"(?s)attention_bias = true.*hidden_act = 'gelu'")


@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters", "type"])
def test_both_spellings_of_rotary_scaling_are_read(form: str) -> None:
    """transformers 4 keeps theta beside the scaling, 5 in it; the oldest said ``type``."""
    given = {**json.loads((saved("llama 3") / "config.json").read_text()), "rope_parameters": None, "rope_theta": 700.0}
    scaling = {("type" if form == "type" else key) if key == "rope_type" else key: value for key, value in LLAMA3.items()}
    if form == "rope_parameters":
        del given["rope_theta"]
        scaling["rope_theta"] = 700.0
    kind, model = read_model({**given, "rope_parameters" if form == "rope_parameters" else "rope_scaling": scaling}, Path("x"))
    assert kind == "llama" and model.rope_theta == 700.0 and model.rope_scaling is not None
    assert model.rope_scaling.model_dump() == {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 32,
    }  # fmt: skip
    assert read_model({**given, "rope_scaling": None}, Path("x"))[1].rope_scaling is None


def test_silent_keys_have_the_values_transformers_gives_them() -> None:
    import transformers

    for name, (kind, _) in MODELS.items():
        values = json.loads((saved(name) / "config.json").read_text())
        sizes = {key for key in values if key.startswith(("n_", "num_hidden", "num_att", "hidden_size", "interm", "vocab", "max_pos"))}
        bare = {key: values[key] for key in sizes | {"model_type"}}
        if kind == "Qwen3":
            bare |= {"hidden_size": 512, "num_key_value_heads": 4}  # its own head width is 128
        if kind == "Mistral":
            bare["num_attention_heads"] = 8  # its own number of KV heads
        full = getattr(transformers, f"{kind}Config")(**{key: value for key, value in bare.items() if key != "model_type"}).to_dict()
        assert read_model(bare, Path("bare"), None) == read_model(full, Path("full"), None), name


def without(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (without("model.layers.1.mlp.up_proj.weight"), "lacks model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(2)}), "holds model.layers.2.mlp.up_proj.weight besides"),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(90, 32)}),
            "lm_head.weight is 90 x 32, config.json says 100 x 32",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}),
            "holds I8 numbers in model.norm.weight: quantised",
        ),
    ],
    ids=["missing", "extra", "shape", "int8"],
)
def test_tensors_that_do_not_fit_are_named(edit: Callable[[Tensors], Any], said: str, tmp_path: Path) -> None:
    refused(changed(tmp_path, tensors=edit), said)


def test_files_that_are_not_there_or_not_whole(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no Hugging Face directory .*not downloaded"):
        import_model("meta-llama/Llama-3.1-8B", tmp_path / "out")
    folder = changed(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    refused(folder, "model.safetensors is no whole safetensors file .*copy or download it again")
    (folder / "model.safetensors").write_bytes(b"\xff" * 20)
    refused(folder, "is no whole safetensors file .its header claims")
    (folder / "model.safetensors").unlink()
    refused(folder, "has neither model.safetensors nor model.safetensors.index.json")
    (folder / "pytorch_model.bin").touch()
    refused(folder, r"pickles .*runs whatever code is in it: .*from_pretrained\(.*save_pretrained")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json is no JSON")
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")


def test_shards_and_index_must_agree(tmp_path: Path) -> None:
    folder = save(a_model("llama 3"), tmp_path / "in", max_shard_size="20KB")
    index, shards = folder / "model.safetensors.index.json", sorted(folder.glob("model-*"))
    content = json.loads(index.read_text())
    held = load_file(shards[1])
    gone = next(iter(held))
    save_file({name: tensor for name, tensor in held.items() if name != gone}, shards[1])
    refused(folder, rf"disagree on {gone} \(in the index alone\)")
    save_file({**held, "extra": torch.zeros(1)}, shards[1])
    refused(folder, r"disagree on extra \(in the files alone\)")
    save_file({**held, next(iter(load_file(shards[0]))): torch.zeros(1)}, shards[1])
    refused(folder, "is in .*00001-of.* and in .*00002-of")
    shards[1].unlink()
    refused(folder, f"{shards[1].name} is missing, which model.safetensors.index.json names")
    index.write_text(json.dumps({**content, "weight_map": dict.fromkeys(content["weight_map"], "../model.safetensors")}))
    refused(folder, "names '../model.safetensors', which is not a file beside it")


@pytest.mark.parametrize("name", ["gpt2", "llama tied"])
def test_files_of_the_bare_model_are_read(name: str, tmp_path: Path) -> None:
    """As GPT-2 was published: no prefix, and the causal mask among the weights."""

    def bare(tensors: Tensors) -> None:
        for key in list(tensors):
            tensors[key.partition(".")[2]] = tensors.pop(key)
        buffers = ("h.0.attn.bias", "h.0.attn.masked_bias") if name == "gpt2" else ("layers.0.self_attn.rotary_emb.inv_freq",)
        tensors.update({buffer: torch.ones(1, 1, 4, 4) for buffer in buffers})

    found, expected = open_start(changed(tmp_path, name, bare)).source, open_start(saved(name)).source
    for matrix in expected.names():
        rows = expected.shape(matrix)[0]
        assert torch.equal(found.rows(matrix, 0, rows), expected.rows(matrix, 0, rows)), matrix


def test_head_beside_a_tied_embedding_must_be_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megastab.checkpoint.weight_source.CHUNK_ROWS", 16)

    def head(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    folder = changed(tmp_path, "llama tied", head)
    assert open_start(folder).model.tie_embeddings
    held = load_file(folder / "model.safetensors")
    held["lm_head.weight"][99, 31] += 1
    save_file(held, folder / "model.safetensors")
    refused(folder, "tie_word_embeddings = true, but lm_head.weight is not model.embed_tokens.weight: set tie_word_embeddings to false")


def test_places_without_weights_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder .*a checkpoint, what tools/convert.py import wrote, or a Hugging Face directory"):
        open_start(tmp_path / "nothing")
    (tmp_path / "run" / "checkpoints" / "step00000010").mkdir(parents=True)
    with pytest.raises(UserError, match="is a run folder: name one of its checkpoints, .*step00000010"):
        open_start(tmp_path / "run")
    weights = tmp_path / "run" / "checkpoints" / "step00000010" / "weights"
    weights.mkdir()
    with pytest.raises(UserError, match="no weights in"):
        open_start(weights.parent)
    save_file({"embedding": torch.zeros(4, 2)}, weights / "a.safetensors", {"starts": '{"embedding": 4}'})
    with pytest.raises(UserError, match="lacks rows 0 to 3 of embedding: a file of another rank is missing"):
        open_start(weights.parent)
    save_file({"embedding": torch.zeros(4, 2)}, weights / "a.safetensors", {"starts": '{"embedding": 0}'})
    with pytest.raises(UserError, match="has neither megastab.json nor config.json"):
        open_start(weights.parent)
    save_file({"embedding": torch.zeros(4, 2)}, weights / "a.safetensors")
    with pytest.raises(UserError, match="is no weights file of ours"):
        open_start(weights.parent)


@pytest.mark.parametrize("text", ["", "5", "big", "-1GB", "0MB", "1TB5"])
def test_sizes_are_read_or_refused(text: str) -> None:
    if text == "5":
        assert (bytes_of(text), bytes_of("5GB"), bytes_of("1.5 mb")) == (5, 5_000_000_000, 1_500_000)
    else:
        with pytest.raises(UserError, match="is no size: write one such as 5GB"):
            bytes_of(text)


def test_rotary_scaling_needs_a_slope() -> None:
    base = {"arch": "llama", "num_layers": 1, "hidden_size": 32, "num_heads": 4, "max_seq_len": 8}
    with pytest.raises(ValueError, match="low_freq_factor = 5 must be below high_freq_factor = 4"):
        ModelConfig.model_validate({**base, "rope_scaling": {"factor": 8, "low_freq_factor": 5, "original_max_seq_len": 8}})
