"""Tiny models of every family, random, and folders of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from megastab.data.tokenizer import Tokenizer
from tests.unit.model_generate.tiny import tiny_config

VOCAB = 96
FAMILIES = ("gpt2", "llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "mistral")


def foreign_model(family: str = "llama", **changes: Any) -> nn.Module:
    """A random model of a family, in memory: 3 blocks, width 32, 4 heads."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 48,
        "head_dim": 8,
        "sliding_window": None,
        "pad_token_id": None,
    }
    if family == "gpt2":
        sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 48}
    if family in ("gemma2", "gemma3_text"):
        sizes["sliding_window"] = 48
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**sizes, "bos_token_id": 1, "eos_token_id": 2, **changes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def save_foreign(folder: Path, family: str = "llama", model: nn.Module | None = None) -> Path:
    """A Hugging Face directory with the model and a tokenizer of single characters."""
    (model or foreign_model(family)).save_pretrained(folder)  # type: ignore[operator]
    character_tokenizer().save_pretrained(folder)
    return folder


def character_tokenizer() -> Any:
    """Ids: 0 unknown, 1 BOS, 2 EOS, then the printable characters from the space on."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [chr(c) for c in range(32, 32 + VOCAB - 3)]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *characters])}
    fast = Fast(models.WordLevel(vocab, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def save_own(run: Path, tokenizer: Tokenizer | None = None, model: nn.Module | None = None, **changes: Any) -> Path:
    """A run folder with one checkpoint of a model of ours (tests.unit.model_generate.tiny), written without an engine."""
    import json

    from safetensors.torch import save_file

    from megastab.checkpoint.manifest import Manifest
    from megastab.checkpoint.weights import FOLDER
    from megastab.parallel.param_info import info_of
    from tests.unit.model_generate.tiny import tiny_model

    config = tiny_config(run=run, tokenizer=str(tokenizer.path) if tokenizer else None, model=changes)
    folder = run / "checkpoints" / "step00000003"
    folder.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(config.resolved()))
    (run / "checkpoints" / "latest").write_text(folder.name)
    Manifest.of(config, 3, 6, tokenizer.fingerprint if tokenizer else None).write(folder)
    matrices = {}
    for parameter in (model or tiny_model(**changes)).parameters():
        info = info_of(parameter)
        rows = parameter.detach().split([part.rows for part in info.parts])
        matrices |= {part.name: piece.clone() for part, piece in zip(info.parts, rows, strict=True)}
    (folder / FOLDER).mkdir()
    save_file(matrices, folder / FOLDER / "pp00-tp00.safetensors", metadata={"starts": json.dumps(dict.fromkeys(matrices, 0))})
    return run
