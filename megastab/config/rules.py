"""Rules that hold between fields of the ``"megastab"`` block and the layout. Each message names the values and the fix.

What DeepSpeed's own keys must not say is in ``refusals.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megastab.config.layout import Layout
from megastab.config.schema import DyTConfig, Megastab, ModelConfig
from megastab.config.settings import stage_of
from megastab.config.vocab import padded_vocab


@dataclass(frozen=True)
class Facts:
    """What a rule may look at: our block, DeepSpeed's part with explicit batch sizes, and the layout."""

    megastab: Megastab
    deepspeed: dict[str, Any]
    layout: Layout

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        return int(self.deepspeed["train_batch_size"]) * self.megastab.model.max_seq_len


Rule = Callable[[Facts], "str | None"]


def broken_rules(facts: Facts) -> list[str]:
    """The message of every rule the config breaks."""
    return [message for rule in RULES if (message := rule(facts))]


def steps_of(tokens: int, tokens_per_step: int) -> int:
    """``tokens`` in steps, rounded up."""
    return -(-tokens // tokens_per_step)


def total_steps(facts: Facts) -> int | None:
    """Length of the run in steps; None when neither steps nor tokens are given."""
    run = facts.megastab.run
    return run.total_steps if run.total_tokens is None else steps_of(run.total_tokens, facts.tokens_per_step)


def warmup_steps(facts: Facts) -> int:
    """Length of the warm-up in steps; 0 when neither steps nor tokens are given."""
    schedule = facts.megastab.schedule
    return (schedule.warmup_steps or 0) if schedule.warmup_tokens is None else steps_of(schedule.warmup_tokens, facts.tokens_per_step)


def _hidden_over_heads(facts: Facts) -> str | None:
    model = facts.megastab.model
    if model.hidden_size % model.num_heads == 0:
        return None
    nearest = max(1, round(model.hidden_size / model.num_heads)) * model.num_heads
    return (
        f"megastab.model.hidden_size = {model.hidden_size} is not a multiple of megastab.model.num_heads = {model.num_heads}: "
        f"use hidden_size = {nearest}, or another number of heads."
    )


def _even_head(facts: Facts) -> str | None:
    model = facts.megastab.model
    if model.arch != "llama" or model.hidden_size % model.num_heads or model.head_dim % 2 == 0:
        return None
    return (
        f"megastab.model.hidden_size / num_heads = {model.hidden_size} / {model.num_heads} = {model.head_dim} is odd, and rotary "
        f"positions turn pairs of channels: use hidden_size = {model.num_heads * (model.head_dim + 1)} or another num_heads."
    )


def _normed_heads(facts: Facts) -> str | None:
    model = facts.megastab.model
    if model.qk_norm != "head" or model.hidden_size // model.num_heads != 1:
        return None
    return (
        f"megastab.model.qk_norm = head with hidden_size / num_heads = {model.hidden_size} / {model.num_heads} = 1 leaves of each head "
        f"its sign alone: use fewer heads, or qk_norm = full."
    )


def _query_groups(facts: Facts) -> str | None:
    model = facts.megastab.model
    if model.num_heads % model.num_kv_heads == 0:
        return None
    return (
        f"megastab.model.num_kv_heads = {model.num_kv_heads} does not divide megastab.model.num_heads = {model.num_heads}: "
        f"use one of {_divisors(model.num_heads)}."
    )


def _heads_over_tensor(facts: Facts) -> str | None:
    heads, tensor = facts.megastab.model.num_heads, facts.layout.tensor
    if heads % tensor == 0:
        return None
    return (
        f"megastab.model.num_heads = {heads} is not a multiple of megastab.parallel.tensor = {tensor}: "
        f"set megastab.parallel.tensor to one of {_divisors(heads)}."
    )


def _kv_heads_over_tensor(facts: Facts) -> str | None:
    heads, tensor = facts.megastab.model.num_kv_heads, facts.layout.tensor
    if heads % tensor == 0 or tensor % heads == 0:
        return None
    return (
        f"megastab.model.num_kv_heads = {heads} and megastab.parallel.tensor = {tensor}: one must divide the other, so that each rank "
        f"holds whole key heads or a copy of one. Set megastab.parallel.tensor to one of {_divisors(heads)}, or a multiple of {heads}."
    )


def head_shares(model: ModelConfig, tensor: int) -> list[int]:
    """Values of ``parallel.context`` that give each rank whole query heads, and whole key heads or a copy of one."""
    heads, kv_heads = model.num_heads // tensor, max(1, model.num_kv_heads // tensor)
    return [size for size in range(1, heads + 1) if heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)]


def _heads_over_context(facts: Facts) -> str | None:
    context, tensor, model = facts.layout.context, facts.layout.tensor, facts.megastab.model
    heads, kv_heads = model.num_heads // tensor, max(1, model.num_kv_heads // tensor)
    if context == 1 or any(rule(facts) for rule in (_query_groups, _heads_over_tensor, _kv_heads_over_tensor)):
        return None  # which heads there are is decided first
    fits = head_shares(model, tensor)
    if context in fits:
        return None
    fits = [size for size in fits if model.max_seq_len % size == 0]
    now = [str(size) for size in fits if facts.layout.copies % size == 0]
    others = [str(size) for size in fits if facts.layout.copies % size]
    more = f", or on another number of ranks {' or '.join(others)}" if others else ""
    return (
        f"megastab.parallel.context = {context} gives each rank of a sequence its own attention heads, and of the "
        f"megastab.model.num_heads = {model.num_heads} over megastab.parallel.tensor = {tensor} there are {heads} (with {kv_heads} of "
        f"megastab.model.num_kv_heads = {model.num_kv_heads}): use context = {' or '.join(now)}{more}."
    )


def _positions_over_context(facts: Facts) -> str | None:
    context, length = facts.layout.context, facts.megastab.model.max_seq_len
    if length % context == 0 or _heads_over_context(facts):
        return None
    step = context * (facts.layout.tensor if facts.megastab.parallel.sequence else 1)
    return (
        f"megastab.model.max_seq_len = {length} is not a multiple of megastab.parallel.context = {context}, which cuts it: "
        f"use max_seq_len = {steps_of(length, step) * step}."
    )


def _ffn_over_tensor(facts: Facts) -> str | None:
    width, tensor = facts.megastab.model.ffn_hidden_size, facts.layout.tensor
    if width % tensor == 0:
        return None
    return (
        f"megastab.model.ffn_hidden_size = {width} is not a multiple of megastab.parallel.tensor = {tensor}: "
        f"use ffn_hidden_size = {steps_of(width, tensor) * tensor}."
    )


def vocabulary_over_tensor(facts: Facts) -> str | None:
    """The padded vocabulary is cut over the tensor-parallel ranks; checked again once the tokenizer has told it."""
    vocab, tensor = facts.megastab.model.vocab_size, facts.layout.tensor
    if vocab is None or padded_vocab(vocab) % tensor == 0:
        return None
    return (
        f"megastab.model.vocab_size = {vocab} is padded to {padded_vocab(vocab)} rows (a multiple of 128), which "
        f"megastab.parallel.tensor = {tensor} does not divide: use a power of two up to 128."
    )


def _layers_over_stages(facts: Facts) -> str | None:
    layers, stages = facts.megastab.model.num_layers, facts.layout.pipeline
    if layers >= stages:
        return None
    return (
        f"megastab.model.num_layers = {layers} is less than megastab.parallel.pipeline = {stages}: some stage would hold no layer. "
        f"Set megastab.parallel.pipeline to {layers} or less."
    )


def _pipeline_with_zero(facts: Facts) -> str | None:
    stages, zero = facts.layout.pipeline, stage_of(facts.deepspeed)
    if stages == 1 or zero < 2:
        return None
    return (
        f"megastab.parallel.pipeline = {stages} with zero_optimization.stage = {zero}: ZeRO 2 and 3 scatter gradients after every "
        f"micro-batch, which the pipeline keeps whole until the last one. Use zero_optimization.stage = 1, or pipeline = 1."
    )


def _sequence_slices(facts: Facts) -> str | None:
    tensor, length = facts.layout.tensor, facts.megastab.model.max_seq_len
    micro, context = facts.deepspeed["train_micro_batch_size_per_gpu"], facts.layout.context
    tokens = micro * (length // context)
    if not facts.megastab.parallel.sequence or tokens % tensor == 0 or length % context:
        return None
    share = f" / megastab.parallel.context = {context}" if context > 1 else ""
    return (
        f"megastab.parallel.sequence cuts the {micro} x {length // context} tokens of a micro-batch (train_micro_batch_size_per_gpu x "
        f"megastab.model.max_seq_len{share}) over megastab.parallel.tensor = {tensor} ranks, and {tokens} is not a multiple of {tensor}: "
        f"use max_seq_len = {steps_of(length, tensor * context) * tensor * context}."
    )


def _dropout_arch(facts: Facts) -> str | None:
    model = facts.megastab.model
    if model.dropout == 0.0 or model.arch == "gpt":
        return None
    return f'megastab.model.dropout = {model.dropout} is for arch "gpt" only: set it to 0, or use megastab.model.arch = "gpt".'


def _rope_scaling_arch(facts: Facts) -> str | None:
    model = facts.megastab.model
    if model.rope_scaling is None or model.arch == "llama":
        return None
    return (
        f'megastab.model.rope_scaling is given with megastab.model.arch = "{model.arch}", whose positions are learned: leave it out, or '
        f'use megastab.model.arch = "llama".'
    )


def _dyt_section(facts: Facts) -> str | None:
    model = facts.megastab.model
    if model.norm == "dyt" or model.dyt == DyTConfig():
        return None
    return (
        f'megastab.model.dyt is given with megastab.model.norm = "{model.norm}", which has no alpha and no embedding scale: '
        f'set megastab.model.norm to "dyt", or leave megastab.model.dyt out.'
    )


def _layer_norm_scaling(facts: Facts) -> str | None:
    model = facts.megastab.model
    if not model.layer_norm_scaling:
        return None
    if model.norm == "dyt":
        reason = "dynamic tanh does not normalise, so that there is no unit variance to scale by depth"
    elif model.norm_position in ("post", "reordered"):
        reason = f'with megastab.model.norm_position = "{model.norm_position}" a block has no input norm to scale'
    else:
        return None
    fix = "another megastab.model.norm" if model.norm == "dyt" else 'megastab.model.norm_position "pre" or "peri"'
    return f"megastab.model.layer_norm_scaling is true, but {reason}: set it to false, or use {fix}."


def _multiplier_undone(facts: Facts) -> str | None:
    model = facts.megastab.model
    if model.embedding_multiplier == 1.0 or not model.embedding_norm or model.norm == "dyt" or model.arch == "gpt":
        return None  # gpt adds positions in between, and dynamic tanh does not divide by its input's size
    return (
        f"megastab.model.embedding_multiplier = {model.embedding_multiplier:g} with megastab.model.embedding_norm: the norm divides the "
        f"factor out again. Set embedding_multiplier to 1, or embedding_norm to false."
    )


def _qk_clip_with_norm(facts: Facts) -> str | None:
    qk_norm = facts.megastab.model.qk_norm
    if facts.megastab.stability.qk_clip is None or qk_norm == "none":
        return None
    return (
        f'megastab.stability.qk_clip with megastab.model.qk_norm = "{qk_norm}": it shrinks the weights of queries and keys, and the norm '
        f'undoes that. Set megastab.stability.qk_clip to null, or megastab.model.qk_norm to "none".'
    )


def _qk_clip_with_cap(facts: Facts) -> str | None:
    cap = facts.megastab.model.attention_softcap
    if facts.megastab.stability.qk_clip is None or cap is None:
        return None
    return (
        f"megastab.stability.qk_clip with megastab.model.attention_softcap = {cap:g}: the cap bounds the logits already, and both would be "
        f"paid for. Set one of them to null."
    )


def _offload_compiled(facts: Facts) -> str | None:
    kind = facts.megastab.parallel.activation_offload.kind
    if kind == "none" or not facts.megastab.run.compile:
        return None
    return (
        f'megastab.parallel.activation_offload.kind = "{kind}" with megastab.run.compile: what a compiled block saves is decided inside '
        f'its graph, where no hook of ours runs. Set megastab.run.compile to false, or kind to "none".'
    )


def _one_length(facts: Facts) -> str | None:
    run = facts.megastab.run
    if run.total_steps is None and run.total_tokens is None:
        return "megastab.run.total_steps is missing: give it, or megastab.run.total_tokens."
    if run.total_steps is not None and run.total_tokens is not None:
        return (
            f"megastab.run.total_steps = {run.total_steps} and megastab.run.total_tokens = {run.total_tokens} are both given: "
            f"keep one (override the other with null)."
        )
    return None


def _one_warmup(facts: Facts) -> str | None:
    schedule = facts.megastab.schedule
    if schedule.warmup_steps is None or schedule.warmup_tokens is None:
        return None
    return (
        f"megastab.schedule.warmup_steps = {schedule.warmup_steps} and megastab.schedule.warmup_tokens = {schedule.warmup_tokens} "
        f"are both given: keep one (override the other with null)."
    )


def _divisors(number: int) -> str:
    return ", ".join(str(part) for part in range(1, number + 1) if number % part == 0)


RULES: tuple[Rule, ...] = (
    _hidden_over_heads,
    _even_head,
    _normed_heads,
    _query_groups,
    _heads_over_tensor,
    _kv_heads_over_tensor,
    _heads_over_context,
    _positions_over_context,
    _ffn_over_tensor,
    vocabulary_over_tensor,
    _layers_over_stages,
    _pipeline_with_zero,
    _sequence_slices,
    _dropout_arch,
    _rope_scaling_arch,
    _dyt_section,
    _layer_norm_scaling,
    _multiplier_undone,
    _qk_clip_with_cap,
    _qk_clip_with_norm,
    _offload_compiled,
    _one_length,
    _one_warmup,
)
