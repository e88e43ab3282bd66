"""What a run would be and hold, from its config alone: no torch, no DeepSpeed, no processes.

Weights, gradients and optimizer states are what the engines hold (``states``); activations are an estimate (``activations``). The
peak of a rank is the larger of two moments: the end of backward (gradients, activations, buckets) and the optimizer's step
(gradients and its workspace).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megastab.config.complete import Completion
from megastab.config.config import Config
from megastab.config.errors import UserError
from megastab.config.settings import offload_device
from megastab.model.counts import flops_per_token, num_parameters
from megastab.plan.activations import Activations, activations
from megastab.plan.offload_text import offload_line
from megastab.plan.parameters import Stage, Weight, decay_groups, stages
from megastab.plan.recompute import Policy, policies
from megastab.plan.states import States, states
from megastab.wrappers.choice import wrapper_name


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage; every rank of it holds the same amount."""

    layers: str
    """In words: ``embedding, blocks 0-15``."""
    parameters: int
    """On one rank."""
    states: States
    activations: Activations

    @property
    def peak(self) -> int:
        """Bytes on the device at the worst moment."""
        held, grads = self.states.weights + self.states.masters + self.states.moments, self.states.gradients
        backward = self.activations.peak + self.states.buckets + self.states.gathered
        return held + grads + max(backward, self.states.step_workspace)


@dataclass(frozen=True)
class DecayGroup:
    """One optimizer group over the whole model."""

    decay: float
    what: str
    parameters: int
    tensors: int


@dataclass(frozen=True)
class Plan:
    """A run before it starts."""

    model: str
    parameters: int
    """Of the whole model, vocabulary padding included, a tied matrix once."""
    layout: dict[str, int | bool]
    precision: str
    zero_stage: int
    wrapper: str
    optimizer: str
    batch: dict[str, int]
    tokens_per_step: int
    steps: int
    flops_per_token: float
    bubble: float
    """Share of a step in which a pipeline stage has nothing to do."""
    recompute: str
    offload: str
    """Of activations, in words; empty where they stay."""
    policies: tuple[Policy, ...]
    """What each value of ``parallel.recompute`` would keep and cost."""
    stages: tuple[StagePlan, ...]
    groups: tuple[DecayGroup, ...]
    completions: tuple[Completion, ...]

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.steps * self.tokens_per_step

    @property
    def flops_per_step(self) -> float:
        """Of all ranks."""
        return self.flops_per_token * self.tokens_per_step

    def to_json(self) -> dict[str, Any]:
        """Plain values, the derived ones beside them."""
        derived = {"tokens": self.tokens, "flops_per_step": self.flops_per_step}
        peaks = [{**asdict(stage), "peak": stage.peak, "activations_peak": stage.activations.peak} for stage in self.stages]
        return {**asdict(self), **derived, "stages": peaks}


def plan(config: Config) -> Plan:
    """The plan of ``config`` for the ranks it was loaded for.

    Raises:
        UserError: the vocabulary is not known.
    """
    config = with_vocabulary(config)
    model, layout = config.megastab.model, config.layout
    offloads, cut = offload_device(config.deepspeed, "optimizer") != "none", stages(model, layout)
    return Plan(
        model=f"{model.arch}: {model.num_layers} blocks, width {model.hidden_size}, {model.num_heads} heads ({model.num_kv_heads} KV), "
        f"MLP {model.ffn_hidden_size}, sequence {model.max_seq_len}, vocabulary {model.vocab_size}",
        parameters=num_parameters(model),
        layout={**asdict(layout), "sequence": config.megastab.parallel.sequence},
        precision=config.precision,
        zero_stage=config.zero_stage,
        wrapper=wrapper_name(config.precision, config.zero_stage, offloads),
        optimizer=config.optimizer_type,
        batch={"global": config.global_batch, "micro": config.micro_batch, "accumulation": config.accumulation, "data": layout.data},
        tokens_per_step=config.tokens_per_step,
        steps=config.total_steps,
        flops_per_token=flops_per_token(model),
        bubble=(layout.pipeline - 1) / (config.accumulation + layout.pipeline - 1),
        recompute=config.megastab.parallel.recompute,
        offload=offload_line(config),
        policies=policies(config, cut),
        stages=tuple(_stage_plan(config, stage) for stage in cut),
        groups=tuple(_groups(config)),
        completions=config.completions,
    )


def with_vocabulary(config: Config) -> Config:
    """The tokenizer's vocabulary where the config leaves it to the tokenizer."""
    if config.megastab.model.vocab_size is not None:
        return config
    path = config.megastab.data.tokenizer
    if path is None:
        raise UserError("megastab.model.vocab_size and megastab.data.tokenizer are both null: give one of them")
    from megastab.data.tokenizer import Tokenizer

    try:
        return config.with_vocab(Tokenizer(path).vocab_size)
    except UserError as error:
        raise UserError(f"{error}; or plan with megastab.model.vocab_size=N") from error


def _stage_plan(config: Config, stage: Stage) -> StagePlan:
    return StagePlan(_in_words(config, stage), stage.elements, states(config, stage), activations(config, stage))


def _in_words(config: Config, stage: Stage) -> str:
    blocks = sorted({int(w.name.split(".")[1]) for w in stage.weights if w.name.startswith("layers.")})
    parts = ["embedding"] if stage.has_embedding else []
    if blocks:
        parts.append(f"blocks {blocks[0]}-{blocks[-1]}" if len(blocks) > 1 else f"block {blocks[0]}")
    return ", ".join(parts + (["head"] if stage.has_head else []))


def _groups(config: Config) -> list[DecayGroup]:
    decay = float(config.optimizer_params.get("weight_decay", 0.0))
    alone = stages(config.megastab.model, type(config.layout)(1, 1, 1, 1))[0]
    return [_group(group, decay) for group in decay_groups(alone.weights, decay)]


def _group(weights: Sequence[Weight], decay: float) -> DecayGroup:
    kinds = {weight.decays for weight in weights}
    what = "all parameters" if len(kinds) > 1 else "matrices and embeddings" if kinds == {True} else "norms and biases"
    return DecayGroup(decay if kinds == {True} else 0.0, what, sum(w.elements for w in weights), len(weights))
