"""What a run was, in words, from its resolved ``config.json``: a list of (name, words). What the file does not say is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megastab.config.schema import ModelConfig
from megastab.config.settings import offload_device, precision_of, read
from megastab.model.counts import num_parameters
from megastab.plan.units import amount

NAMES = {
    "llama": "LLaMA",
    "gpt": "GPT",
    "zclip": "ZClip",
    "tvr": "TVR",
    "qk_clip": "QK-clip",
    "policy": "Policy",
    "autoclip": "AutoClip",
    "adagc": "AdaGC",
    "skip_step": "SkipStep",
}
RESCALERS = ("tvr", "qk_clip", "policy")  # sections of stability that do not clip


def what_ran(config: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, words) for model, layout, batch, precision, optimizer, clipping, other methods, and data; empty for an empty config."""
    rows = [
        ("Model", _model(read(config, "megastab.model", {}))),
        ("Layout", _layout(config)),
        ("Batch", _batch(config)),
        ("Precision", _precision(config) if config else ""),
        ("Optimizer", _optimizer(config)),
        ("Schedule", _settings(read(config, "megastab.schedule", {}))),
        ("Clipping", _clipping(config) if config else ""),
        *[(NAMES.get(name, name), _settings(section)) for name, section in _sections(config) if name in RESCALERS],
        ("Data", ", ".join(str(part[1]) for part in _pairs(read(config, "megastab.data.train", [])))),
        ("Seed", str(read(config, "megastab.run.seed", ""))),
    ]
    return [(name, words) for name, words in rows if words]


def _model(model: Any) -> str:
    if not isinstance(model, dict) or not model:
        return ""
    arch = str(model.get("arch", "model"))
    words = [f"{NAMES.get(arch, arch)}{_size(model)}", f"{model.get('num_layers')} layers of width {model.get('hidden_size')}"]
    heads, shared = model.get("num_heads"), model.get("num_kv_heads")
    words.append(f"{heads} heads" + (f" over {shared} of keys and values" if shared not in (None, heads) else ""))
    words += [f"sequences of {model.get('max_seq_len')} tokens", f"vocabulary {model.get('vocab_size')}"]
    return ", ".join([*words, f"init {_settings(model['init'])}"] if isinstance(model.get("init"), dict) else words)


def _size(model: dict[str, Any]) -> str:
    try:
        return f" of {amount(num_parameters(ModelConfig(**model)))} parameters"
    except (ValueError, TypeError, AssertionError):  # written by another version, or before the vocabulary was known
        return ""


def _layout(config: dict[str, Any]) -> str:
    parallel = read(config, "megastab.parallel", {})
    if not isinstance(parallel, dict) or not parallel:
        return ""
    sizes = {"tensor": parallel.get("tensor", 1), "pipeline": parallel.get("pipeline", 1)}
    if parallel.get("context", 1) != 1:
        sizes["context"] = parallel["context"]
    batch, micro, accumulation = (config.get(key) for key in BATCH)
    if all(isinstance(value, int) and value > 0 for value in (batch, micro, accumulation)):
        sizes["data"] = batch // (micro * accumulation)  # type: ignore[operator]
    words = " x ".join(f"{name} {size}" for name, size in sizes.items())
    extras = ["sequence parallel"] if parallel.get("sequence") else []
    extras += [f"recompute {parallel['recompute']}"] if parallel.get("recompute", "none") != "none" else []
    return ", ".join([words, *extras])


BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def _batch(config: dict[str, Any]) -> str:
    batch, micro, accumulation = (config.get(key) for key in BATCH)
    if not isinstance(batch, int):
        return ""
    length = read(config, "megastab.model.max_seq_len")
    tokens = f", {batch * length} tokens a step" if isinstance(length, int) else ""
    cut = f" (micro-batches of {micro}, {accumulation} a step and rank)" if micro and accumulation else ""
    return f"{batch} samples{cut}{tokens}"


def _precision(config: dict[str, Any]) -> str:
    offloaded = [what for what in ("optimizer", "param") if offload_device(config, what) != "none"]
    words = f"{precision_of(config)}, ZeRO {read(config, 'zero_optimization.stage', 0)}"
    return words + (f", {' and '.join(offloaded)} offloaded" if offloaded else "")


def _optimizer(config: dict[str, Any]) -> str:
    kind = read(config, "optimizer.type")
    return "" if kind is None else f"{kind}: {_settings(read(config, 'optimizer.params', {}))}"


def _clipping(config: dict[str, Any]) -> str:
    cap = read(config, "gradient_clipping", 0.0)
    rules = [f"{NAMES.get(name, name)} ({_settings(section)})" for name, section in _sections(config) if name not in RESCALERS]
    return ", ".join([*rules, *([f"fixed cap {cap:g}"] if isinstance(cap, (int, float)) and cap > 0 else [])]) or "none"


def _sections(config: dict[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    sections = read(config, "megastab.stability", {})
    return [(name, value) for name, value in sections.items() if isinstance(value, dict)] if isinstance(sections, dict) else []


def _settings(section: Any) -> str:
    """``lr 0.001, betas 0.9 0.95``; what is off or unset is not said."""
    if not isinstance(section, dict):
        return ""
    said = {key: value for key, value in section.items() if value is not None and value is not False and value not in ([], {})}
    return ", ".join(key if value is True else f"{key} {_value(value)}" for key, value in said.items())


def _value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_value, value))
    if isinstance(value, dict):
        return " ".join(f"{key}={_value(entry)}" for key, entry in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _pairs(value: Any) -> list[Any]:
    return [part for part in value if isinstance(part, list) and len(part) == 2] if isinstance(value, list) else []
