"""Names of other people's parameters: what role a matrix plays, and which block it belongs to.

A matrix is known by the module that holds it, as Hugging Face names them. What is not in the table has no role, so that nothing which
acts by role (TVR) touches it; :func:`register` adds to the table. Not in it on purpose: GPT-2's ``c_attn``, ``c_fc`` and ``c_proj``.
Its ``Conv1D`` stores them [in, out], with q, k and v side by side along dim 1: no range of rows is one of them. The same holds for
``qkv_proj``, ``gate_up_proj`` and ``query_key_value``, whose inner order differs from model to model.
"""

from __future__ import annotations

import math
import re
from typing import get_args

from torch import nn

from megastab.config.errors import UserError
from megastab.parallel.grid import ALONE, TensorParallel
from megastab.parallel.param_info import ParamInfo, Part, Role

ROLES: dict[str, Role] = {
    # LLaMA, Qwen, Mistral, Gemma
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "embed_tokens": "embedding",
    "lm_head": "head",
    # GPT-2
    "wte": "embedding",
    "wpe": "position",
    # GPT-NeoX
    "dense_h_to_4h": "up",
    "dense_4h_to_h": "down",
    "embed_in": "embedding",
    "embed_out": "head",
}

_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_registered: list[tuple[re.Pattern[str], Role]] = []


def register(pattern: str, role: Role) -> None:
    """Give every matrix whose name ``pattern`` (a regular expression) is found in the role ``role``; the latest pattern wins.

    Call it before ``megastab.initialize`` or ``megastab.attach``. ``"other"`` says that a matrix is known to have no role.
    """
    if role not in get_args(Role):
        raise UserError(f"role {role!r} of pattern {pattern!r} must be one of {', '.join(get_args(Role))}")
    try:
        _registered.insert(0, (re.compile(pattern), role))
    except re.error as error:
        raise UserError(f"pattern {pattern!r} is not a regular expression: {error}") from None


def role_of(name: str) -> Role | None:
    """Role of the matrix called ``name``; None for one nobody knows."""
    for pattern, role in _registered:
        if pattern.search(name):
            return role
    *_, module = ["", *name.removesuffix(".weight").split(".")]
    return ROLES.get(module)


def layer_of(name: str) -> int | None:
    """0-based block, from the digits after ``layers.``, ``h.`` or ``blocks.``; None outside the blocks."""
    found = _BLOCK.search(name)
    return int(found[1]) if found else None


def foreign_info(parameter: nn.Parameter, name: str, tp: TensorParallel = ALONE) -> ParamInfo:
    """A foreign parameter: one whole matrix, or a share of one where Megatron's flag says that tensor-parallel ranks hold others.

    A matrix of known role is called by its module (as ours are, so that its bias is ``NAME.bias``), any other by its own name. A share
    cut along dim 1 is described as one of rows: the number of elements, which is what statistics need, is right either way.
    """
    shape = getattr(parameter, "ds_shape", parameter.shape)
    rows = shape[0] if len(shape) > 1 else math.prod(shape)
    role, width = role_of(name), math.prod(shape[1:]) if len(shape) > 1 else None
    if width is None:
        role = "bias" if name.split(".")[-1] == "bias" else "norm"
    elif role is not None:
        name = name.removesuffix(".weight")
    is_sharded = tp.size > 1 and bool(getattr(parameter, "tensor_model_parallel", False))
    part = Part.cut(name, role or "other", rows * tp.size, tp) if is_sharded else Part.whole(name, role or "other", rows)
    return ParamInfo((part,), layer_of(name), width, is_first_copy=is_sharded or tp.rank == 0, is_sharded=is_sharded)


def without_role(names_and_parameters: dict[str, nn.Parameter]) -> list[str]:
    """Matrices nobody knows, alike ones of several blocks once: ``transformer.h.*.attn.c_attn.weight (12)``."""
    counts: dict[str, int] = {}
    for name, parameter in names_and_parameters.items():
        if len(getattr(parameter, "ds_shape", parameter.shape)) > 1 and role_of(name) is None:
            alike = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
            counts[alike] = counts.get(alike, 0) + 1
    return [f"{name} ({count})" if count > 1 else name for name, count in counts.items()]
