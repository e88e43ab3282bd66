"""One number: every layout trains exactly as one process does. A feature is a row, never new machinery.

Tolerances, all relative, fp32:

* loss and norm 2e-6 over 8 steps: a few fp32 roundings (6e-8) of sums taken in another order, amplified by 8 updates;
* gradient of the first step 1e-5 of its matrix's largest entry: one backward, where small entries are differences of larger terms;
* weights after 8 steps 1e-5 of the matrix's largest with SGD-momentum (linear in the gradient), 1e-4 with AdamW and OrthoAdam, which
  divide by sqrt(v): where |g| is near eps = 1e-6, rounding of g moves the weight by a share of the learning rate. 5e-4 for biases with
  AdamW: they start at 0, so the largest is the distance travelled, and one entry with |g| = 1e-7 < eps was seen to be 1.6e-4 of it off.

GPT's key bias shifts all scores of a query alike, so softmax removes it: its gradient is 0 and what is computed is rounding. Its
gradient is held against the query bias's scale; under Adam its value is not compared (rounding over rounding is +-lr).
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests import jobs
from tests.layouts import GLOBAL_BATCH, GPT, SEQ, SINGLE, STEPS, Layout, config_of
from tests.ranks import RankFailed, run_ranks

LOSS_AND_NORM, GRADIENT, WEIGHT, ADAM_BIAS = 2e-6, 1e-5, {"SGD": 1e-5, "AdamW": 1e-4, "OrthoAdam": 1e-4}, 5e-4
# bf16 rounds to 4e-3 and fp16 to 5e-4; the loss averages 192 tokens, the norm some thousand entries of correlated error.
# Measured over the rows: loss 2.8e-4 and 5e-5, norm 4e-3 and 6e-4.
LOW_LOSS = {"bf16": 1e-3, "fp16": 2e-4}
LOW_NORM = {"bf16": 1e-2, "fp16": 2e-3}

ROWS_A_JOB = 12
JOB_TIMEOUT = 900.0  # of the references: every config of the matrix

CLIPS_SOME = {"warmup_steps": 2, "alpha": 0.5, "z_thresh": 0.1}  # quick and jumpy, so that 8 steps hold clipped and ordinary ones
# ZeRO-3 else keeps small parameters, and those soon used again, whole on every rank.
RELEASED = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "deep": {"model": {"num_layers": 4}},  # a stage of one block offloads nothing
    "deep_dropout": {"model": {**GPT, "num_layers": 4, "dropout": 0.1}, "data": {"document_mask": True}},
    "gqa2": {"model": {"num_kv_heads": 2}},
    "mqa": {"model": {"num_kv_heads": 1}},
    "tied": {"model": {"tie_embeddings": True}},
    "large_tied": {"model": {"tie_embeddings": True, "vocab_size": 1900}},  # over pp 2 the last stage is the tied head alone
    "gpt": {"model": GPT},
    "gpt_untied": {"model": {**GPT, "tie_embeddings": False}},
    "dropout": {"model": {**GPT, "dropout": 0.1}},
    "documents": {"data": {"document_mask": True}},
    "gpt_documents_dropout": {"model": {**GPT, "dropout": 0.1}, "data": {"document_mask": True}},
    "topk": {"model": {"activation": "topk", "activation_topk": 0.25}},
    "relu2": {"model": {"activation": "relu2"}},
    "relu": {"model": {"activation": "relu"}},
    "layernorm": {"model": {"norm": "layernorm"}},
    "dyt_tied": {"model": {"norm": "dyt", "tie_embeddings": True}},
    "gpt_dyt": {"model": {**GPT, "norm": "dyt", "norm_position": "peri", "embedding_norm": True}},
    "peri": {"model": {"norm_position": "peri", "embedding_norm": True}},
    "post": {"model": {"norm_position": "post", "embedding_norm": True}},
    "reordered_softcap": {
        "model": {"norm_position": "reordered", "logit_softcap": 3.0, "embedding_multiplier": 2.0, "tie_embeddings": True}
    },
    "gpt_normed": {  # factor, positions, norm, dropout: everything between look-up and blocks
        "model": {**GPT, "embedding_norm": True, "embedding_multiplier": 2.0, "logit_softcap": 3.0, "dropout": 0.1},
        "loss": {"z_loss": 1e-2},
    },
    "depth_scaled": {"model": {"layer_norm_scaling": True}},
    "z_loss": {"loss": {"z_loss": 1e-2}},
    "scalar": {"model": {"norm": "rmsnorm_scalar"}},
    "softmax1_capped": {"model": {"sink": "softmax1", "attention_softcap": 0.5}},  # logits are of order 1 here
    "learned_head_head": {"model": {"num_kv_heads": 1, "sink": "learned", "qk_norm": "head", "output_gate": "head"}},
    "kv_bias_full_element": {"model": {"num_kv_heads": 2, "sink": "kv_bias", "qk_norm": "full", "output_gate": "element"}},
    "kv_bias_documents": {"model": {"sink": "kv_bias", "attention_softcap": 0.5}, "data": {"document_mask": True}},
    "kv_bias_released": {"model": {"num_kv_heads": 2, "sink": "kv_bias", "qk_norm": "head"}, "ds__zero_optimization": RELEASED},
    "learned_released": {"model": {"sink": "learned"}, "ds__zero_optimization": RELEASED},
    "gpt_kv_bias_head": {"model": {**GPT, "num_kv_heads": 1, "sink": "kv_bias", "qk_norm": "head", "output_gate": "element"}},
    "gpt_learned_full": {"model": {**GPT, "sink": "learned", "qk_norm": "full", "output_gate": "head"}},
    "lir": {"model__init": {"scheme": "lir"}},
    "residual_scaled": {"model__init": {"scheme": "residual_scaled"}},
    "padding": {"model": {"vocab_size": 130}},  # padded to 256: over tp 4 the last rank holds padding only
    "clipped": {"ds__gradient_clipping": 0.2},
    "zclip": {"stability": {"zclip": CLIPS_SOME}},
    "tvr": {"stability": {"tvr": {"target_std": 0.09, "interval_tokens": 2 * GLOBAL_BATCH * SEQ}}},  # every matrix starts above its target
    "stable": {
        "model__init": {"scheme": "lir"},
        "stability": {"zclip": CLIPS_SOME, "tvr": {"target_std": 0.06, "interval_steps": 3}},
    },
    "gqa2_stable": {
        "model": {"num_kv_heads": 2},
        "stability": {"zclip": CLIPS_SOME, "tvr": {"target_std": 0.09, "interval_steps": 2}},
    },
    "zclip_parameter": {"stability": {"zclip": {**CLIPS_SOME, "scope": "parameter"}}},
    "zclip_layer": {"ds__gradient_clipping": 1.25, "stability": {"zclip": {**CLIPS_SOME, "scope": "layer"}}},
    "tied_adagc": {"model": {"tie_embeddings": True}, "stability": {"adagc": {"warmup_steps": 3}}},
    "autoclip": {"stability": {"autoclip": {"percentile": 40.0}}},
    "skip_step": {"stability": {"skip_step": {"rolling_interval_length": 4, "sigma_factor": 0.1}}},
    "skip_spikes": {"stability": {"zclip": CLIPS_SOME, "policy": {"on_spike": "skip"}}},
    "qk_clip": {"model": {"num_kv_heads": 2}, "stability": {"qk_clip": {"threshold": 0.4}}},  # all heads at first, a few later on
    "qk_clip_documents_tvr": {
        "data": {"document_mask": True},
        "model": {"sink": "kv_bias"},
        "stability": {"qk_clip": {"threshold": 0.4, "balance": 0.2}, "tvr": {"target_std": 0.09, "interval_steps": 2}},
    },
    "gpt_qk_clip": {"model": GPT, "stability": {"qk_clip": {"threshold": 0.4}}},
    "gqa2_clipped": {"model": {"num_kv_heads": 2}, "ds__gradient_clipping": 0.2},
    "ortho": {"model": {"num_kv_heads": 2}},
    "ortho_48": {"model": {"hidden_size": 48, "ffn_hidden_size": 80, "tie_embeddings": True}},  # rows cut by partitions
    "ortho_gated": {"model": {"num_kv_heads": 2, "sink": "kv_bias", "qk_norm": "full", "output_gate": "head"}},
    "ortho_haar": {"model": {"tie_embeddings": True}, "ds__optimizer__params": {"rotation": "haar"}},
    "ortho_both": {"model": {"num_kv_heads": 2}, "ds__optimizer__params": {"axes": "both"}},  # matrices gathered whole
}
# Parts of the names of models some of whose steps are clipped or skipped.
RESCALING = ("tvr", "stable")
CLIPPING = ("clipped", "zclip", "stable", "adagc", "autoclip", "skip")


@dataclass(frozen=True)
class Row:
    """A layout, and which of MODELS it trains."""

    layout: Layout
    model: str = "llama"
    dtype: str = "fp32"

    def __str__(self) -> str:
        return f"{self.model}-{self.layout}" + (f"-{self.dtype}" if self.dtype != "fp32" else "")


def rows(model: str, *layouts: Layout, dtype: str = "fp32") -> list[Row]:
    return [Row(layout, model, dtype) for layout in layouts]


def optimizers_of(model: str) -> list[str]:
    """The optimizers a model is trained with: the two ordinary ones, or OrthoAdam alone."""
    return [kind for kind in WEIGHT if (kind == "OrthoAdam") == model.startswith("ortho")]


TP2, TP4, PP2, DP2 = Layout(2, tp=2), Layout(4, tp=4), Layout(2, pp=2, accumulation=3), Layout(2)
TP2_SP, TP4_SP = Layout(2, tp=2, sp=True), Layout(4, tp=4, sp=True)
TP2_PP2, TP2_PP2_SP = Layout(4, tp=2, pp=2, accumulation=2), Layout(4, tp=2, pp=2, sp=True, accumulation=2)
Z1_DP2, Z2_DP2, Z3_DP2 = Layout(2, zero=1), Layout(2, zero=2), Layout(2, zero=3)
Z1_PP2_DP2 = Layout(4, pp=2, zero=1, accumulation=2)
CP2, CP4, CP2_PP2, CP2_TP2_SP = Layout(2, cp=2), Layout(4, cp=4), Layout(4, cp=2, pp=2, accumulation=2), Layout(4, tp=2, cp=2, sp=True)

FP32 = [
    *rows("llama", TP2, TP4, PP2, DP2, Layout(3), TP2_SP, TP4_SP, TP2_PP2, TP2_PP2_SP, Layout(4, tp=2), Layout(4, tp=2, sp=True)),
    *rows("llama", Layout(1, accumulation=4), Layout(2, accumulation=3), Layout(1, zero=1), Z1_DP2, Z2_DP2, Z3_DP2, Layout(3, zero=3)),
    *rows("llama", Layout(4, tp=2, zero=1), Layout(4, tp=2, zero=2), Layout(4, tp=2, zero=3), Z1_PP2_DP2, Layout(4, pp=2, accumulation=2)),
    *rows("llama", *(Layout(4, tp=2, sp=True, zero=stage) for stage in (1, 2, 3)), Layout(2, zero=2, accumulation=3)),
    *rows("llama", Layout(2, zero=3, accumulation=3), Layout(2, zero=2, offload=True)),
    *rows("llama", Layout(2, tp=2, sp=True, compile=True), Layout(2, zero=3, compile=True)),
    *rows("gqa2", TP2, TP4, TP4_SP, *(Layout(4, tp=4, sp=True, zero=stage) for stage in (1, 2, 3))),
    *rows("mqa", TP2, TP2_SP, *(Layout(4, tp=2, zero=stage) for stage in (1, 2, 3)), TP2_PP2_SP),
    *rows("tied", TP2, PP2, TP2_PP2, TP2_PP2_SP, Z1_PP2_DP2, Z3_DP2, Layout(4, tp=2, zero=3)),
    *rows("large_tied", PP2, TP2_PP2_SP, Z1_PP2_DP2),
    *rows("gpt", TP2, PP2, TP2_PP2_SP, Layout(4, tp=2, sp=True, zero=2)),
    *rows("gpt_untied", TP2_SP, PP2),
    *rows("dropout", TP2, TP2_SP, DP2, PP2, TP2_PP2_SP, Layout(1, accumulation=4), Z3_DP2, Layout(2, tp=2, recompute="full")),
    *rows("llama", *(Layout(2, tp=2, sp=True, recompute=kind) for kind in ("selective", "full")), Layout(2, zero=3, recompute="full")),
    *rows("llama", Layout(2, pp=2, accumulation=3, recompute="full"), Layout(2, pp=2, accumulation=3, recompute="selective")),
    *rows("deep", Layout(4, tp=2, pp=2, sp=True, accumulation=2, activations="ssd")),
    *rows("deep_dropout", Layout(2, zero=3, accumulation=2, recompute="selective", activations="ssd")),
    *rows("llama", *(Layout(2, zero=stage, offload=True) for stage in (1, 3)), Layout(2, zero=3, offload=True, offload_param=True)),
    *rows("documents", Layout(1, accumulation=4), DP2, Layout(2, accumulation=3), TP2, TP2_SP, PP2, TP2_PP2_SP, Z3_DP2),
    *rows("gpt_documents_dropout", TP2_PP2_SP, Layout(2, accumulation=2, recompute="selective")),
    *rows("topk", TP2, TP2_SP),
    *rows("relu2", TP2),
    *rows("relu", TP2),
    *rows("layernorm", TP2_SP, PP2, TP2_PP2_SP, Z3_DP2),
    *rows("scalar", TP2, PP2, TP2_PP2_SP, Z3_DP2),
    *rows("softmax1_capped", TP2, PP2, TP2_PP2_SP, Z1_DP2, Z3_DP2),
    *rows("learned_head_head", TP2, TP4_SP, PP2, TP2_PP2_SP, Z3_DP2, Layout(2, tp=2, sp=True, compile=True), Layout(4, tp=2, zero=2)),
    *rows("kv_bias_full_element", TP2, TP4_SP, PP2, TP2_PP2_SP, Z3_DP2, Layout(4, tp=4, sp=True, zero=3)),
    *rows("kv_bias_full_element", Layout(2, tp=2, sp=True, compile=True), Layout(2, tp=2, sp=True, recompute="selective")),
    *rows("kv_bias_documents", TP2_PP2_SP, Z3_DP2),
    *rows("kv_bias_released", Z3_DP2, Layout(2, zero=3, compile=True)),
    *rows("learned_released", Z3_DP2),
    *rows("gpt_kv_bias_head", TP2_PP2_SP, Layout(4, tp=2, zero=3)),
    *rows("gpt_learned_full", TP2_PP2_SP, Layout(2, zero=3, recompute="full")),
    *rows("dyt_tied", TP2, PP2, TP2_PP2_SP, Z1_DP2, Z3_DP2, Layout(4, tp=2, sp=True, zero=2), Layout(2, tp=2, sp=True, compile=True)),
    *rows("gpt_dyt", TP2_PP2_SP, Z3_DP2),
    *rows("peri", TP2, TP2_SP, PP2, TP2_PP2_SP, Z1_DP2, Z2_DP2, Z3_DP2),
    *rows("post", TP2, TP2_SP, PP2, TP2_PP2_SP, Z3_DP2),
    *rows("reordered_softcap", TP2, PP2, TP2_PP2_SP, Z1_DP2, Z2_DP2, Z3_DP2),
    *rows("gpt_normed", PP2, TP2_PP2_SP, Z3_DP2),
    *rows("depth_scaled", PP2, TP2_PP2_SP, Z3_DP2),
    *rows("z_loss", TP2, PP2),
    *rows("lir", TP2, PP2, Z3_DP2),
    *rows("residual_scaled", TP2_PP2),
    *rows("padding", TP4, Layout(4, tp=4, sp=True, zero=3)),
    *rows("clipped", TP2, PP2, TP2_PP2_SP, Z1_DP2, Z2_DP2, Z3_DP2, Layout(4, tp=2, sp=True, zero=1), Z1_PP2_DP2),
    *rows("gqa2_clipped", Layout(4, tp=4)),
    *rows("zclip", TP2, PP2, Z1_DP2, Z3_DP2),
    *rows("zclip_parameter", TP2_PP2_SP, DP2, Z1_DP2, Z2_DP2, Z3_DP2, Layout(4, tp=2, sp=True, zero=3), Layout(2, zero=2, offload=True)),
    *rows("zclip_layer", TP2_PP2_SP, Z1_PP2_DP2),
    *rows("tied_adagc", TP2_PP2_SP, PP2, Z1_DP2),
    *rows("autoclip", TP2, Z1_PP2_DP2),
    *rows("skip_step", TP2_PP2_SP, Z1_DP2, Z3_DP2),
    *rows("skip_spikes", TP2, PP2, DP2, Z1_DP2, Z2_DP2, Z3_DP2),
    *rows("tvr", TP2, PP2, DP2, Z1_DP2, Z2_DP2, Z3_DP2, Layout(3, zero=3)),
    *rows("stable", TP2, TP4, PP2, TP2_PP2, TP2_PP2_SP, DP2, Z1_DP2, Z2_DP2, Z3_DP2, Z1_PP2_DP2),
    *rows("stable", *(Layout(4, tp=2, sp=True, zero=stage) for stage in (1, 2, 3)), Layout(2, zero=2, offload=True)),
    *rows("gqa2_stable", TP4, TP4_SP, *(Layout(4, tp=4, sp=True, zero=stage) for stage in (1, 3))),
    *rows("qk_clip", TP2, TP4, PP2, TP2_PP2_SP, DP2, Z1_DP2, Z2_DP2, Z3_DP2, Layout(4, tp=4, sp=True, zero=3)),
    *rows("qk_clip", Layout(2, tp=2, sp=True, compile=True), Layout(2, tp=2, sp=True, recompute="selective")),
    *rows("qk_clip_documents_tvr", TP2_PP2_SP, Layout(2, accumulation=3), Z3_DP2),
    *rows("gpt_qk_clip", TP2_PP2_SP, Layout(2, zero=2, offload=True)),
    *rows("llama", CP2, CP4, CP2_TP2_SP, CP2_PP2, Layout(2, cp=2, accumulation=3), Layout(4, cp=2), Layout(4, cp=2, zero=1)),
    *rows("llama", Layout(2, cp=2, zero=2), Layout(4, cp=2, zero=3), Layout(2, cp=2, compile=True), Layout(2, cp=2, zero=3, compile=True)),
    *rows("llama", *(Layout(2, cp=2, recompute=kind) for kind in ("selective", "full"))),
    *rows("mqa", CP4, CP2_TP2_SP),
    *rows("gqa2", CP4, Layout(4, tp=2, cp=2, zero=3)),
    *rows("deep", Layout(4, cp=2, pp=2, accumulation=2, activations="ssd")),
    *rows("gpt_documents_dropout", CP2, CP2_PP2, CP2_TP2_SP),
    *rows("softmax1_capped", CP2, CP2_PP2),
    *rows("learned_head_head", CP4, CP2_TP2_SP),
    *rows("kv_bias_full_element", CP4, CP2_TP2_SP),
    *rows("kv_bias_documents", CP2_PP2, Layout(4, cp=2, zero=3)),
    *rows("gpt_kv_bias_head", CP2_TP2_SP),
    *rows("stable", CP2, CP2_PP2, CP2_TP2_SP, Layout(4, cp=2, zero=1), Layout(4, cp=2, zero=3)),
    *rows("zclip_parameter", CP2_TP2_SP, Layout(4, cp=2)),
    *rows("qk_clip", CP2, CP4, CP2_TP2_SP, Layout(4, cp=2, zero=3)),
    *rows("qk_clip_documents_tvr", CP2_PP2),
    *rows("ortho_both", CP2_TP2_SP, Layout(4, cp=2, zero=3)),
    *rows("ortho", TP2, PP2, TP2_PP2_SP, DP2, Layout(4, tp=4), Z1_PP2_DP2),
    *rows("ortho_48", Z1_DP2, Z2_DP2, Z3_DP2, Layout(3, zero=3), Layout(4, tp=2, zero=3), Layout(2, zero=2, offload=True)),
    *rows("ortho_gated", TP2_PP2_SP, Layout(3, zero=3)),
    *rows("ortho_haar", TP2_PP2, Layout(3, zero=3)),
    *rows("ortho_both", TP2, PP2, Layout(4, tp=4), Z1_DP2, Z3_DP2, Layout(4, tp=2, zero=3)),
]  # fmt: skip


LOW = [
    *rows("llama", Layout(1, zero=2), Layout(2, tp=2, zero=1), Layout(2, pp=2, zero=1, accumulation=3), dtype="bf16"),
    *rows("llama", Z1_DP2, Z2_DP2, Z3_DP2, Layout(2, zero=2, offload=True, accumulation=2), dtype="bf16"),
    *rows("gqa2", Layout(4, tp=4, sp=True, zero=1), Layout(4, tp=2, pp=2, sp=True, zero=1, accumulation=2), dtype="bf16"),
    *rows("mqa", Layout(4, tp=2, sp=True, zero=3), dtype="bf16"),
    *rows("stable", Z1_DP2, Z2_DP2, Z3_DP2, Layout(4, tp=2, pp=2, sp=True, zero=1, accumulation=2), dtype="bf16"),
    *rows("zclip_parameter", Z1_DP2, Layout(4, tp=2, pp=2, sp=True, zero=1, accumulation=2), dtype="bf16"),
    *rows("tied", Layout(4, tp=2, pp=2, sp=True, zero=1, accumulation=2), dtype="bf16"),
    *rows("dyt_tied", Layout(4, tp=2, pp=2, sp=True, zero=1, accumulation=2), Z3_DP2, dtype="bf16"),
    *rows("large_tied", Layout(4, tp=2, pp=2, sp=True, zero=1, accumulation=2), dtype="bf16"),  # ranks with nothing to count
    *rows("dropout", Layout(2, zero=1, accumulation=2), Layout(4, tp=2, pp=2, sp=True, zero=1, accumulation=2), dtype="bf16"),
    *rows("llama", Layout(2, tp=2, zero=1), Z1_DP2, Z2_DP2, Z3_DP2, Layout(4, tp=2, pp=2, sp=True, zero=1, accumulation=2), dtype="fp16"),
    *rows("llama", Layout(2, cp=2, zero=2), Layout(4, cp=2, pp=2, zero=1, accumulation=2), dtype="bf16"),
    *rows("kv_bias_full_element", Layout(4, tp=2, cp=2, sp=True, zero=3), dtype="bf16"),
    *rows("softmax1_capped", Z1_DP2, dtype="bf16"),
    *rows("deep", Layout(4, tp=2, pp=2, sp=True, zero=1, accumulation=2, activations="ssd"), dtype="bf16"),
    *rows("llama", Layout(2, zero=1, offload=True), Layout(2, zero=3, offload=True, offload_param=True), dtype="bf16"),
    *rows("learned_head_head", Layout(4, tp=2, pp=2, sp=True, zero=1, accumulation=2), dtype="bf16"),
    *rows("kv_bias_full_element", Layout(4, tp=4, sp=True, zero=1), Z3_DP2, dtype="bf16"),
    *rows("qk_clip", Layout(4, tp=2, pp=2, sp=True, zero=1, accumulation=2), Z2_DP2, dtype="bf16"),
    *rows("ortho", Layout(4, tp=2, pp=2, sp=True, zero=1, accumulation=2), Z2_DP2, dtype="bf16"),
    *rows("ortho_48", Z1_DP2, Z3_DP2, dtype="bf16"),
    *rows("ortho_both", Z1_DP2, Layout(4, tp=2, pp=2, sp=True, zero=1, accumulation=2), dtype="bf16"),
    *rows("ortho_48", Z2_DP2, dtype="fp16"),
]  # fmt: skip


def train_all(layout: Layout, cells: list[tuple[str, str]]) -> dict[tuple[str, str], dict[str, jobs.Report]]:
    """On a rank: every (model, dtype) of one layout, with each of its optimizers, one engine after another."""
    return {
        (model, dtype): {kind: jobs.train(config_of(layout, kind, dtype, **MODELS[model]), STEPS) for kind in optimizers_of(model)}
        for model, dtype in cells
    }


def cells_of(layout: Layout) -> list[tuple[str, str]]:
    return [(row.model, row.dtype) for row in [*FP32, *LOW] if row.layout == layout]


@functools.cache
def job_of(layout: Layout, first: int) -> list[Any] | None:
    """Rows of a layout from number ``first`` on in one job, because starting one costs more than training; None if some row broke it.

    Not all of them: the groups an engine leaves behind keep threads that wake a hundred times a second, and forty engines' crowd out the
    work of those after them.
    """
    cells = cells_of(layout)[first : first + ROWS_A_JOB]
    try:
        return run_ranks(layout.world, train_all, layout, cells, timeout=JOB_TIMEOUT)
    except RankFailed:
        return None


def reports(row: Row) -> list[dict[str, jobs.Report]]:
    """Every rank's runs of a row; alone in its job where a neighbour may have broken the common one."""
    cell = (row.model, row.dtype)
    number = cells_of(row.layout).index(cell)
    ranks = job_of(row.layout, number - number % ROWS_A_JOB) or run_ranks(row.layout.world, train_all, row.layout, [cell])
    return [rank[cell] for rank in ranks]


@functools.cache
def references() -> dict[tuple[str, str], dict[str, jobs.Report]]:
    """The single-process run of every config in the matrix."""
    cells = sorted({(row.model, row.dtype) for row in [*FP32, *LOW]})
    return run_ranks(1, train_all, SINGLE, cells, timeout=JOB_TIMEOUT)[0]


def relative(mine: list[float], theirs: list[float]) -> float:
    return float(np.max(np.abs(np.array(mine) - theirs) / np.abs(theirs)))


def scale_of(name: str, whole: dict[str, np.ndarray]) -> float:
    """What a matrix's deviation is measured against: its own largest entry, the query bias's for the key bias."""
    return float(np.abs(whole[name.replace(".k.bias", ".q.bias")]).max())


def worst(mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray], skip: str = "\0") -> tuple[float, str]:
    """Largest deviation relative to its matrix's scale, and that matrix."""
    assert mine.keys() == theirs.keys()
    return max((float(np.abs(mine[n] - theirs[n]).max()) / scale_of(n, theirs), n) for n in theirs if not n.endswith(skip))


def note(row: Row, values: dict[str, Any]) -> None:
    """Keep what was measured where MEGASTAB_MEASURED names a file, for tools and for setting tolerances."""
    if path := os.environ.get("MEGASTAB_MEASURED"):
        with open(path, "a") as file:
            file.write(json.dumps({"row": str(row), **values}) + "\n")


@pytest.mark.parametrize("row", FP32, ids=str)
def test_layout_trains_as_one_process(row: Row) -> None:
    single_runs, per_rank = references()[row.model, row.dtype], reports(row)
    for kind, single in single_runs.items():
        ranks = [report[kind] for report in per_rank]
        assert all(r.losses == ranks[0].losses and r.norms == ranks[0].norms for r in ranks), "ranks disagree"
        found = {}
        for what in ("initial", "gradients", "final"):
            whole, drift = jobs.merge(getattr(r, what) for r in ranks)
            assert drift == 0.0, f"copies of one element differ by {drift} ({what})"
            found[what] = (whole, jobs.merge([getattr(single, what)])[0])
        assert all(np.array_equal(mine, found["initial"][1][name]) for name, mine in found["initial"][0].items()), "initial weights"
        loss, norm = relative(ranks[0].losses, single.losses), relative(ranks[0].norms, single.norms)
        gradient = worst(*found["gradients"])
        weight = worst(*found["final"], skip="bias" if kind == "AdamW" else "\0")
        note(row, {"optimizer": kind, "loss": loss, "norm": norm, "gradient": gradient, "weight": weight})
        assert loss <= LOSS_AND_NORM and norm <= LOSS_AND_NORM, (kind, loss, norm)
        assert gradient[0] <= GRADIENT, (kind, gradient)
        assert weight[0] <= WEIGHT[kind], (kind, weight)
        if kind == "AdamW" and row.model.startswith(("gpt", "dropout", "dyt")):
            bias = worst(*({n: w for n, w in whole.items() if n.endswith("bias")} for whole in found["final"]), skip=".k.bias")
            assert bias[0] <= ADAM_BIAS, bias
        assert all((r.moved_bytes > 0) == (row.layout.activations != "none") for r in ranks), "the row does not test what it says"
        assert all(r.rescaled == single.rescaled for r in ranks), "rescale decisions"
        assert any(name in row.model for name in RESCALING) == any(single.rescaled), "the row does not test what it says"
        assert all(r.qk_clipped == single.qk_clipped for r in ranks), "heads clipped"
        assert ("qk_clip" in row.model) == any(single.qk_clipped), "the row does not test what it says"
        clips = any(name in row.model for name in CLIPPING)
        assert clips == any(scale < 1 for scale in single.scales), "the row does not test what it says"
        is_mixed = clips and not any(name in row.model for name in ("clipped", "adagc"))  # these clip every step
        assert not is_mixed or any(scale == 1 for scale in single.scales), "no step is an ordinary one"


@pytest.mark.parametrize("row", LOW, ids=str)
def test_low_precision(row: Row) -> None:
    """The same decisions on rounded activations: bound on loss and norm, ranks exactly agreed."""
    single_runs, per_rank = references()[row.model, row.dtype], reports(row)
    for kind, single in single_runs.items():
        ranks = [report[kind] for report in per_rank]
        assert all(r.losses == ranks[0].losses and r.norms == ranks[0].norms for r in ranks), "ranks disagree"
        whole, drift = jobs.merge(r.initial for r in ranks)
        exact = jobs.merge([single.initial])[0]
        assert drift == 0.0 and all(np.array_equal(whole[name], exact[name]) for name in exact), "initial masters"
        assert jobs.merge(r.final for r in ranks)[1] == 0.0, "copies of one element differ"
        assert all((r.moved_bytes > 0) == (row.layout.activations != "none") for r in ranks), "the row does not test what it says"
        loss, norm = relative(ranks[0].losses, single.losses), relative(ranks[0].norms, single.norms)
        note(row, {"optimizer": kind, "loss": loss, "norm": norm})
        assert loss <= LOW_LOSS[row.dtype] and norm <= LOW_NORM[row.dtype], (kind, loss, norm)
