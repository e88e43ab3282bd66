"""What no architecture of Hugging Face has goes out with a modelling file of its own, and computes the same there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from megastab.checkpoint.hf_export import export_model
from megastab.checkpoint.hf_modeling import CODE
from megastab.config.errors import UserError
from megastab.model.generate import generate
from megastab.model.transformer import Transformer
from tests.layouts import GPT, LLAMA, NORM_VARIANTS, VOCAB
from tests.oracle.models import build, logical

GQA = {"num_kv_heads": 2}
SINKS: dict[str, dict[str, Any]] = {
    "softmax1, one gain": {"sink": "softmax1", "norm": "rmsnorm_scalar", "tie_embeddings": True},
    "learned, gate a head": {**GQA, "sink": "learned", "output_gate": "head", "activation": "topk"},
    "kv bias, all else": {**GQA, "sink": "kv_bias", "output_gate": "element", "qk_norm": "head", "attention_softcap": 3.0},
    "kv bias, full norm": {**GQA, "sink": "kv_bias", "qk_norm": "full", "activation": "relu"},
    "gpt, gate": {**GPT, **GQA, "output_gate": "head", "sink": "softmax1", "activation": "relu2"},
    "scaled rotation": {"sink": "softmax1", "rope_scaling": {"factor": 8.0, "original_max_seq_len": 16}},
}
VARIANTS = {**NORM_VARIANTS, **SINKS}


def a_checkpoint(folder: Path, variant: dict[str, Any], dtype: torch.dtype = torch.float32) -> Transformer:
    """The weights folder of a model with random gains and biases, as a run leaves it."""
    torch.manual_seed(0)
    model = build({**LLAMA, **variant}).eval()
    held = {}
    for name, matrix in logical(model).items():
        matrix.data.normal_(1.0 if name.endswith(("norm", "alpha")) else 0.0, 0.2)
        held[name] = matrix.detach().to(dtype).clone(memory_format=torch.contiguous_format)
    (folder / "weights").mkdir(parents=True)
    save_file(held, folder / "weights" / "pp00-tp00.safetensors", {"starts": json.dumps(dict.fromkeys(held, 0))})
    block = {"model": model.config.model_dump(mode="json"), "data": {"tokenizer": None}, "run": {}}
    (folder / "config.json").write_text(json.dumps({"megastab": block}))
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_modelling_file_computes_the_variant(name: str, tmp_path: Path) -> None:
    """The check is the test: fp32, 1e-4 of the largest logit; what is found is some 1e-6 (``test_the_check_sees_each_part``)."""
    a_checkpoint(tmp_path / "ours", VARIANTS[name])
    with pytest.raises(UserError, match="has no architecture for this model.*With --modeling-file it goes out with code of its own"):
        export_model(tmp_path / "ours", tmp_path / "out")
    made = export_model(tmp_path / "ours", tmp_path / "out", has_code=True)
    assert made.kind == "megastab" and made.check["result"] == "equal" and made.check["max_abs_difference"] < 2e-5
    assert made.check["max_abs_logit"] > 1.0


PARTS = {
    "no sink": ('elif m["sink"] == "learned":', 'elif m["sink"] == "none":', "learned, gate a head"),
    "sink's value": ("out + p[..., :1] * value[:, None]", "out", "kv bias, all else"),
    "sink's norm": ('key if m["qk_norm"] == "none" else', "key if True else", "kv bias, full norm"),
    "a head's gate": ("* gate[..., None]", "* gate[..., :1, None]", "gpt, gate"),
    "scale by depth": ("1 / math.sqrt(layer + 1)", "1", "scaled"),
    "position": ('position in ("peri", "reordered")', 'position in ("reordered",)', "gpt peri"),
    "alpha": ('self._w(f"{name}.alpha")', "1.0", "dyt"),
    "multiplier": ('m["embedding_multiplier"] *', "", "gpt peri"),
    "topk": ("x.topk(keep,", "x.topk(keep + 1,", "learned, gate a head"),
    "factor": ('/ scaling["factor"]', "", "scaled rotation"),
    "cap": ("(logits.float() / cap).tanh() * cap", "logits", "softcap"),
}


@pytest.mark.parametrize("part", PARTS)
def test_the_check_sees_each_part(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong, variant = PARTS[part]
    a_checkpoint(tmp_path / "ours", VARIANTS[variant])

    def write_code(folder: Path) -> None:
        source = (Path(export_model.__code__.co_filename).parent / CODE).read_text()
        assert right in source
        (folder / CODE).write_text(source.replace(right, wrong))

    monkeypatch.setattr("megastab.checkpoint.hf_export.write_code", write_code)
    with pytest.raises(UserError, match="the exported model is not the model"):
        export_model(tmp_path / "ours", tmp_path / "out", has_code=True)


def test_transformers_loads_it_and_continues_a_text_as_we_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    ours = a_checkpoint(tmp_path / "ours", VARIANTS["kv bias, all else"])
    export_model(tmp_path / "ours", tmp_path / "out", max_shard_bytes=20_000, has_code=True)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    prompt = [5, 17, 80]
    found = theirs.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist()
    assert found == prompt + generate(ours, prompt, 8, temperature=0.0)
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(2))
    padded, mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1), torch.ones(2, 12, dtype=torch.long)
    mask[:, :3] = 0
    with torch.no_grad():
        plain = theirs(ids, labels=ids)
        behind = theirs(padded, attention_mask=mask).logits[:, 3:]
    assert (behind - plain.logits).abs().max() < 1e-4, "padding in front takes no positions"
    expected = torch.nn.functional.cross_entropy(plain.logits[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1))
    assert abs(plain.loss - expected) < 1e-6


def test_what_hugging_face_has_goes_out_without_code(tmp_path: Path) -> None:
    a_checkpoint(tmp_path / "ours", {"tie_embeddings": True}, torch.bfloat16)
    made = export_model(tmp_path / "ours", tmp_path / "out", has_code=True)
    assert made.kind == "llama" and not (made.folder / CODE).exists()
