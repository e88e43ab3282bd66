"""A model of ours as a :class:`Subject`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megastab.analysis.subject import Codec, Linear, Subject
from megastab.config.errors import UserError
from megastab.data.tokenizer import Tokenizer
from megastab.engine.inference import Loaded, load_for_inference, tokenizer_of
from megastab.model.attention import Attention
from megastab.model.attention_maps import attention_maps
from megastab.model.block import Block
from megastab.model.transformer import Transformer
from megastab.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megastab.parallel.param_info import info_of


def open_own(checkpoint: Path, dtype: torch.dtype | None = None) -> Subject:
    """The model of a checkpoint folder, named after its run and step."""
    loaded = load_for_inference(checkpoint, dtype)
    tokenizer, problem = _tokenizer(checkpoint, loaded)
    run = checkpoint.resolve().parent.parent.name
    return subject_of(loaded.model, f"{run}/{checkpoint.resolve().name}", tokenizer, problem)


def subject_of(model: Transformer, name: str, tokenizer: Tokenizer | None = None, problem: str = "it has no tokenizer") -> Subject:
    """A model in memory, whole on this process."""
    config = model.config
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    vocab_size = config.vocab_size or 0
    return Subject(
        name=name,
        model=model.eval(),
        blocks=list(blocks),
        heads=config.num_heads,
        hidden_size=config.hidden_size,
        max_seq_len=config.max_seq_len,
        vocab_size=vocab_size,
        forward=lambda tokens_BS: _logits(model, tokens_BS)[..., :vocab_size],
        stream=partial(_logits, model),
        find=lambda part: [block.attention if part == "attention" else block.mlp for block in blocks],
        find_linears=partial(_linears, blocks),
        maps_of=_maps,
        codec=Codec(tokenizer.encode, tokenizer.decode, tokenizer.eod) if tokenizer else None,
        no_codec=problem,
        tokenizer=tokenizer,
        is_ours=True,
        has_sink=config.sink != "none",
    )


def _maps(module: nn.Module, inputs: Any, _output: Any) -> Tensor:
    assert isinstance(module, Attention)
    return attention_maps(module, *inputs[:2])


def _logits(model: Transformer, tokens_BS: Tensor) -> Tensor:
    """[B, S] -> [B, S, rows of the padded vocabulary]."""
    return model.logits(tokens_BS).view(*tokens_BS.shape, -1)


def _tokenizer(checkpoint: Path, loaded: Loaded) -> tuple[Tokenizer | None, str]:
    """The run's, or None and why: token ids can be looked at without one."""
    try:
        return tokenizer_of(checkpoint, loaded), ""
    except UserError as error:
        return None, str(error)


def _linears(blocks: list[Block]) -> Iterator[Linear]:
    for layer, block in enumerate(blocks):
        for module in block.modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                yield _linear(module, layer)


def _linear(module: nn.Module, layer: int) -> Linear:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    info = info_of(weight)
    assert info is not None, "our matrices are all described"
    is_row = isinstance(module, RowParallelLinear)
    parts = (weight.shape[1],) if is_row else tuple(part.rows for part in info.parts)
    return Linear(info.name, module, layer, "+".join(part.role for part in info.parts), weight, is_row, parts)
