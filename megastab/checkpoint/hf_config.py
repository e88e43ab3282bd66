"""A Hugging Face ``config.json`` and our model section, each made from the other, or refused by the keys that stand in the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megastab.config.errors import UserError
from megastab.config.schema import ModelConfig, RopeScalingConfig

Values = dict[str, Any]

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "mistral": "MistralForCausalLM",
}
# What transformers takes where config.json is silent, for the keys whose silence we must understand.
_LLAMA = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02, "attention_bias": False}
DEFAULTS: dict[str, Values] = {
    "llama": {**_LLAMA, "mlp_bias": False},
    "mistral": {**_LLAMA, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen3": {**_LLAMA, "num_key_value_heads": 32, "head_dim": 128, "use_sliding_window": False},
    "olmo2": {**_LLAMA, "rms_norm_eps": 1e-5},
    "gpt2": {
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "initializer_range": 0.02,
        "resid_pdrop": 0.1, "embd_pdrop": 0.1, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
}  # fmt: skip
# Values without which the network is another one than ours.
REQUIRED: dict[str, Values] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"attention_bias": False},
    "qwen3": {"attention_bias": False, "use_sliding_window": False},
    "olmo2": {"attention_bias": False},
    "gpt2": {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu", "relu2": "relu2"}
_SIZES = {"num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "num_heads": "num_attention_heads",
          "ffn_hidden_size": "intermediate_size", "vocab_size": "vocab_size"}  # fmt: skip
_GPT2_SIZES = {"num_layers": "n_layer", "hidden_size": "n_embd", "num_heads": "n_head", "vocab_size": "vocab_size"}
_MIXTURE = ("num_local_experts", "num_experts", "n_routed_experts")
# The fields of ModelConfig by which an architecture of Hugging Face is known, over these.
_PLAIN: Values = {
    "arch": "llama", "norm": "rmsnorm", "norm_position": "pre", "layer_norm_scaling": False, "embedding_norm": False,
    "embedding_multiplier": 1.0, "qk_norm": "none", "sink": "none", "output_gate": "none", "attention_softcap": None,
    "logit_softcap": None,
}  # fmt: skip
EXPRESSIBLE: dict[str, Values] = {
    "llama": _PLAIN,
    "qwen3": {**_PLAIN, "qk_norm": "head"},
    "olmo2": {**_PLAIN, "norm_position": "reordered", "qk_norm": "full"},
    "gpt2": {**_PLAIN, "arch": "gpt", "norm": "layernorm"},
}


def read_model(given: Values, where: Path, max_seq_len: int | None = None) -> tuple[str, ModelConfig]:
    """(``model_type``, our model section) of a ``config.json``; ``max_seq_len`` shortens the context of a rotary model.

    Raises:
        UserError: keys whose values our model cannot express, all of them at once.
    """
    kind = given.get("model_type")
    if kind not in DEFAULTS:
        raise UserError(
            f"{where}: model_type = {kind!r} is not one megastab can express: it knows {', '.join(DEFAULTS)} "
            f"(no mixtures of experts, no quantised models)"
        )
    values = {**DEFAULTS[kind], **given}
    problems = _refused(kind, values)
    section = _gpt2_section(values, problems) if kind == "gpt2" else _llama_section(kind, values, problems)
    _shorten(kind, section, max_seq_len, problems)
    if kind == "mistral" and (window := values["sliding_window"]) is not None and window < (section["max_seq_len"] or 0):
        problems.append(
            f"sliding_window = {window} is below the context of {section['max_seq_len']} tokens, and our attention has no window: "
            f"import it with --max-seq-len {window}, up to which the window hides nothing"
        )
    if problems:
        raise UserError("\n  ".join([f"{where} is of a model megastab cannot express:", *problems]))
    try:
        return kind, ModelConfig.model_validate(section)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, part['loc']))} = {part['input']!r}: {part['msg']}" for part in error.errors())
        raise UserError(f"{where} has values no model can have: {wrong}") from None


def _refused(kind: str, values: Values) -> list[str]:
    problems = [
        f"{key} = {_said(values[key])}, and ours has {key} = {_said(wanted)} only"
        for key, wanted in REQUIRED[kind].items()
        if values[key] != wanted
    ]
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method", "?")
        problems.append(f"quantization_config ({method}): its weights are quantised; import the model they were made from")
    problems += [f"{key} = {values[key]}: a mixture of experts" for key in _MIXTURE if (values.get(key) or 0) > 1]
    if values.get("auto_map"):
        problems.append("auto_map: it brings model code of its own, which is not run")
    act = "activation_function" if kind == "gpt2" else "hidden_act"
    if values[act] not in ACTIVATIONS:
        problems.append(f"{act} = {values[act]!r} is not one of {', '.join(ACTIVATIONS)}")
    return problems


def _sizes(values: Values, names: dict[str, str], problems: list[str]) -> Values:
    problems += [f"{key} is missing" for key in names.values() if values.get(key) is None]
    return {ours: values.get(theirs) for ours, theirs in names.items()}


def _llama_section(kind: str, values: Values, problems: list[str]) -> Values:
    section = _sizes(values, {**_SIZES, "max_seq_len": "max_position_embeddings"}, problems)
    hidden, heads = section["hidden_size"], section["num_heads"]
    if hidden and heads and (values.get("head_dim") or hidden // heads) * heads != hidden:
        width = values.get("head_dim") or hidden // heads
        problems.append(f"head_dim = {width} with {heads} heads is not hidden_size = {hidden}, and our heads share out the hidden size")
    if any(kind != "full_attention" for kind in values.get("layer_types") or ()):
        problems.append("layer_types names others than full_attention, and our layers are alike")
    return section | _rope(values, problems) | {
        "arch": "llama",
        "num_kv_heads": values.get("num_key_value_heads") or heads,
        "activation": ACTIVATIONS.get(values["hidden_act"]),
        "norm_eps": values["rms_norm_eps"],
        "tie_embeddings": values["tie_word_embeddings"],
        "init": {"std": values["initializer_range"]},
        "norm_position": EXPRESSIBLE.get(kind, _PLAIN)["norm_position"],
        "qk_norm": EXPRESSIBLE.get(kind, _PLAIN)["qk_norm"],
    }  # fmt: skip


def _rope(values: Values, problems: list[str]) -> Values:
    """From ``rope_theta`` and ``rope_scaling``, or the one ``rope_parameters`` of transformers 5."""
    given = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    theta = given.get("rope_theta", values.get("rope_theta", 10000.0))
    form = given.get("rope_type", given.get("type", "default"))
    if form not in ("default", "llama3") or any(isinstance(value, dict) for value in given.values()):
        problems.append(f"rope_scaling of type {form!r}: ours has llama3's, or none")
    if (part := given.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))) != 1.0:
        problems.append(f"partial_rotary_factor = {part}: ours turns whole heads")
    if form != "llama3":
        return {"rope_theta": theta}
    names = ("factor", "low_freq_factor", "high_freq_factor")
    problems += [f"rope_scaling.{key} is missing" for key in names if key not in given]
    length = given.get("original_max_position_embeddings", values.get("max_position_embeddings"))
    return {"rope_theta": theta, "rope_scaling": {**{key: given.get(key) for key in names}, "original_max_seq_len": length}}


def _gpt2_section(values: Values, problems: list[str]) -> Values:
    section = _sizes(values, {**_GPT2_SIZES, "max_seq_len": "n_positions"}, problems)
    return {
        **section,
        "arch": "gpt",
        "ffn_hidden_size": values.get("n_inner"),  # null is 4 x hidden for both
        "activation": ACTIVATIONS.get(values["activation_function"]),
        "norm_eps": values["layer_norm_epsilon"],
        "tie_embeddings": values["tie_word_embeddings"],
        "dropout": values["resid_pdrop"],
        "init": {"std": values["initializer_range"]},
    }


def _shorten(kind: str, section: Values, max_seq_len: int | None, problems: list[str]) -> None:
    longest = section["max_seq_len"] or 0
    if max_seq_len is None:
        return
    if max_seq_len > longest:
        problems.append(f"--max-seq-len {max_seq_len} is above the model's {longest} positions")
    elif kind == "gpt2" and max_seq_len != longest:
        problems.append(f"--max-seq-len {max_seq_len}: its {longest} positions are learned weights, and stay")
    section["max_seq_len"] = max_seq_len


def kind_of(model: ModelConfig) -> str:
    """The ``model_type`` that computes what ``model`` does.

    Raises:
        UserError: none does; the message names the keys in the way, for the nearest.
    """
    wrong = {kind: _inexpressible(model, kind) for kind in EXPRESSIBLE}
    kind = min(wrong, key=lambda kind: len(wrong[kind]))
    if wrong[kind]:
        raise UserError(
            f"Hugging Face has no architecture for this model; the nearest is {kind}, where these are in the way: {'; '.join(wrong[kind])}"
        )
    return kind


def _inexpressible(model: ModelConfig, kind: str) -> list[str]:
    found = [(key, getattr(model, key), wanted) for key, wanted in EXPRESSIBLE[kind].items()]
    said = [f"megastab.model.{key} = {_said(value)} ({kind} has {_said(wanted)})" for key, value, wanted in found if value != wanted]
    if model.activation not in ACTIVATIONS.values():
        said.append(f'megastab.model.activation = "{model.activation}"')
    if kind == "gpt2" and model.num_kv_heads != model.num_heads:
        said.append(f"megastab.model.num_kv_heads = {model.num_kv_heads} with num_heads = {model.num_heads} (gpt2 has no grouped heads)")
    return said


def _said(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')


def write_model(model: ModelConfig, kind: str, dtype: str, tokens: Values) -> Values:
    """The ``config.json`` of ``model``; ``tokens`` holds ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``.

    Rotary keys are those of transformers 4, which 5 reads as well.
    """
    made: Callable[[ModelConfig], Values] = _gpt2_config if kind == "gpt2" else _llama_config
    head = {"architectures": [ARCHITECTURES[kind]], "model_type": kind, "torch_dtype": dtype, "use_cache": True, **tokens}
    common = {
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init.std,
    }
    return {**head, **common, **made(model), **({"mlp_bias": False} if kind == "llama" else {})}


def _llama_config(model: ModelConfig) -> Values:
    return {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "gelu_pytorch_tanh" if model.activation == "gelu" else model.activation,
        "max_position_embeddings": model.max_seq_len,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": _rope_scaling(model.rope_scaling),
        "attention_bias": False,
        "attention_dropout": 0.0,
    }


def _rope_scaling(scaling: RopeScalingConfig | None) -> Values | None:
    if scaling is None:
        return None
    named = scaling.model_dump()
    return {"rope_type": "llama3", "original_max_position_embeddings": named.pop("original_max_seq_len"), **named}


def _gpt2_config(model: ModelConfig) -> Values:
    return {
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_positions": model.max_seq_len,
        "activation_function": "gelu_new" if model.activation == "gelu" else model.activation,
        "layer_norm_epsilon": model.norm_eps,
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": 0.0,
    }
