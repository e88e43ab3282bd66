"""A local Hugging Face directory as a :class:`Subject`. ``transformers`` is imported here, when asked for; no hub is ever contacted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError
from torch import Tensor, nn

from megastab.analysis.subject import Codec, Linear, Names, Subject
from megastab.config.errors import UserError
from megastab.parallel.foreign import role_of

LOCAL = {"local_files_only": True, "trust_remote_code": False}
NOT_A_PART = ("norm", "ln_", "dropout")  # of what attention and MLP are sought among
HINTS = {"attention": ("attn", "attention"), "mlp": ("mlp", "ffn", "feed_forward", "feedforward")}
GPT2_ROLES = {"attn.c_attn": "q+k+v", "attn.c_proj": "o", "mlp.c_fc": "up", "mlp.c_proj": "down"}


def open_foreign(path: Path, dtype: torch.dtype | None, names: Names, is_eager: bool = False) -> Subject:
    """The causal language model of a directory, its weights all present."""
    transformers = _transformers()
    model = _load(transformers, path, dtype, is_eager)
    codec, tokenizer, problem = _codec(transformers, path, model.config)
    subject = subject_of(model, path.resolve().name, names)
    subject.codec, subject.no_codec, subject.tokenizer = codec, problem, tokenizer
    return subject


def subject_of(model: nn.Module, name: str, names: Names | None = None) -> Subject:
    """A model in memory; it has no tokenizer."""
    names = names or Names()
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    blocks_name, blocks = find_blocks(model, config.num_hidden_layers, names.blocks)
    return Subject(
        name=name,
        model=model.to(get_accelerator().current_device_name()).eval(),
        blocks=blocks,
        heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        max_seq_len=getattr(config, "max_position_embeddings", sys.maxsize),
        vocab_size=config.vocab_size,
        forward=lambda tokens_BS: model(input_ids=tokens_BS, use_cache=False).logits,
        stream=lambda tokens_BS: model.base_model(input_ids=tokens_BS, use_cache=False),  # type: ignore[operator]
        find=lambda part: [_part(block, part, names) for block in blocks],
        find_linears=partial(_linears, blocks_name, blocks),
        has_sink=any(hasattr(module, "sinks") for module in model.modules()),  # gpt-oss
        maps_of=lambda _module, _inputs, output: _maps(output),
    )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"Hugging Face models need transformers ({error}): pip install megastab[analysis]") from None
    return transformers


def _load(transformers: Any, path: Path, dtype: torch.dtype | None, is_eager: bool) -> nn.Module:
    is_cpu = get_accelerator().device_name() == "cpu"
    # transformers 4.56 called it dtype; before, that word is unknown and was torch_dtype
    word = "dtype" if tuple(int(x) for x in transformers.__version__.split(".")[:2]) >= (4, 56) else "torch_dtype"
    options = {word: dtype or (torch.float32 if is_cpu else "auto"), **({"attn_implementation": "eager"} if is_eager else {})}
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(str(path), output_loading_info=True, **options, **LOCAL)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"{path} cannot be loaded as a causal language model: {_first_line(error)}") from None
    if info["missing_keys"]:  # transformers draws them at random and goes on
        missing = ", ".join(sorted(info["missing_keys"])[:5])
        raise UserError(f"{path} lacks {missing}: a download that was cut off, or weights of another model; copy the folder again")
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _codec(transformers: Any, path: Path, config: Any) -> tuple[Codec | None, Any, str]:
    """(codec, tokenizer, why there is none). Some tokenizers (Qwen) have no BOS token whatever their model's config says."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), **LOCAL)
    except Exception as error:  # every tokenizer class fails in its own way where its files are missing
        return None, None, f"its directory has no tokenizer that can be read ({_first_line(error)})"

    def encode(text: str) -> list[int]:
        return [int(i) for i in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    return Codec(encode, decode, tokenizer.bos_token_id), tokenizer, ""


# -- structure ---------------------------------------------------------------------------------------------------------


def find_blocks(model: nn.Module, num_layers: int, name: str | None = None) -> tuple[str, list[nn.Module]]:
    """The list of ``num_layers`` modules of one kind, or the one called ``name``; with its dotted name."""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    if name is not None:
        if name not in lists:
            raise UserError(f"--blocks {name}: no list of modules of that name; there are {_told(lists)}")
        return name, list(lists[name])
    fitting = [n for n, m in lists.items() if len(m) == num_layers and len({type(child) for child in m}) == 1]
    outer = [n for n in fitting if not any(n.startswith(other + ".") for other in fitting)]
    if len(outer) != 1:
        what = f"several lists of {num_layers} equal modules ({', '.join(outer)})" if outer else f"no list of {num_layers} equal modules"
        raise UserError(f"{type(model).__name__} has {what}; its lists are {_told(lists)}: name its blocks, e.g. --blocks transformer.h")
    return outer[0], list(lists[outer[0]])


def _told(lists: dict[str, nn.ModuleList]) -> str:
    outer = {n: m for n, m in lists.items() if not any(n.startswith(other + ".") for other in lists)}
    told = [f"{n} ({len(m)} x {type(m[0]).__name__ if len(m) else 'nothing'})" for n, m in outer.items()]
    return ", ".join(told) or "none"


def _part(block: nn.Module, part: str, names: Names) -> nn.Module:
    """The attention or the MLP of a block, by the name given or by what children are called."""
    children = dict(block.named_children())
    if (given := getattr(names, part)) is not None:
        found = [given] if given in children else []
    else:
        found = [n for n in children if any(h in n.lower() for h in HINTS[part]) and not any(x in n.lower() for x in NOT_A_PART)]
    if len(found) != 1:
        there = ", ".join(f"{n} ({type(m).__name__})" for n, m in children.items())
        what = f"--{part} {given} is not in" if given is not None else f"cannot tell which is the {part} of"
        raise UserError(f"{what} {type(block).__name__}, which holds {there}: name it, e.g. --{part} {HINTS[part][0]}")
    return children[found[0]]


def _linears(blocks_name: str, blocks: list[nn.Module]) -> Iterator[Linear]:
    from transformers.pytorch_utils import Conv1D

    for layer, block in enumerate(blocks):
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                yield _linear(f"{blocks_name}.{layer}.{name}", name, module, layer, isinstance(module, Conv1D))


def _linear(full: str, name: str, module: Any, layer: int, is_transposed: bool) -> Linear:
    weight: nn.Parameter = module.weight
    out = weight.shape[1] if is_transposed else weight.shape[0]
    role = (GPT2_ROLES.get(name) if is_transposed else role_of(f"{full}.weight")) or name.split(".")[-1]
    parts = (out // 3,) * 3 if role == "q+k+v" else (out,)
    return Linear(full, module, layer, role, weight, is_transposed, parts)


def _maps(output: Any) -> Tensor:
    """[B, Q, S, S] of what an eager attention module returned; an error where it kept them to itself."""
    if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor):
        return output[1]
    raise UserError("its attention does not hand out its maps: needs transformers >= 4.48 and a model with eager attention")
