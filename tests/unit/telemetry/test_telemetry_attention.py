"""What telemetry sees of attention is the same at every layout, is what the model's own softmax is, and is looked at once.

Tolerances: a layout adds the same products in another order, a few fp32 roundings (6e-8) per sum over two layers: logits are held to 1e-5
relative, and as they are of order 1, what is formed from them to 1e-5. The share is a count of queries.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megastab.config.schema_telemetry import TelemetryConfig
from megastab.parallel.grid import Axis
from megastab.telemetry import heads
from megastab.telemetry.attention import AttentionWatch
from megastab.telemetry.heads import Head
from megastab.telemetry.sampler import Sample, Sampler
from tests import jobs
from tests.layouts import GPT, Layout, config_of
from tests.ranks import run_ranks
from tests.unit.telemetry.test_telemetry_heads import dense

ALONE = TelemetryConfig(interval_steps=1, activations=False, weights=False)
DOCUMENTS = {"data": {"document_mask": True}}
SINKS = ("none", "softmax1", "learned", "kv_bias")
QUERIES = 6  # of 16, so that positions are chosen


@dataclass(frozen=True)
class Cell:
    layout: Layout
    model: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)

    def config(self, layout: Layout) -> dict[str, Any]:
        return config_of(layout, model=self.model, **self.changes)


CELLS = {
    "recompute-full": Cell(Layout(1, accumulation=2, recompute="full"), {"sink": "learned", "qk_norm": "head"}),
    "recompute-selective": Cell(Layout(1, accumulation=3, recompute="selective"), {"sink": "kv_bias"}),
    "accumulated": Cell(Layout(1, accumulation=12), changes=DOCUMENTS),
    "tp2": Cell(Layout(2, tp=2), {"sink": "softmax1", "num_kv_heads": 2, "attention_softcap": 1.0}),
    "tp2-mqa-bias": Cell(Layout(2, tp=2, sp=True), {"sink": "kv_bias", "num_kv_heads": 1, "qk_norm": "full"}, DOCUMENTS),
    "tp2-full": Cell(Layout(2, tp=2, sp=True, accumulation=2, recompute="full"), {**GPT, "sink": "learned"}),
    "pp2": Cell(Layout(2, pp=2, accumulation=3), {"sink": "learned"}, DOCUMENTS),
    "pp2-full": Cell(Layout(2, pp=2, accumulation=3, recompute="full"), {"qk_norm": "head"}),
    "dp2": Cell(Layout(2, accumulation=2), {"num_kv_heads": 2}),
    "zero3": Cell(Layout(2, zero=3), {"sink": "learned"}, {"ds__zero_optimization": {"stage3_param_persistence_threshold": 0}}),
    "zero3-bias": Cell(Layout(2, zero=3, accumulation=2, recompute="selective"), {"sink": "kv_bias", "qk_norm": "head"}),
    "tp2-pp2-sp": Cell(Layout(4, tp=2, pp=2, sp=True, accumulation=2), {"sink": "softmax1", "num_kv_heads": 2}, DOCUMENTS),
    "tp2-zero3": Cell(Layout(4, tp=2, sp=True, zero=3), {"sink": "kv_bias", "num_kv_heads": 1}),
    "cp2": Cell(Layout(2, cp=2, accumulation=2, recompute="full"), {"sink": "learned", "num_kv_heads": 2}, DOCUMENTS),
    "cp2-mqa-bias": Cell(Layout(2, cp=2), {"sink": "kv_bias", "num_kv_heads": 1, "qk_norm": "full"}, DOCUMENTS),
    "cp4": Cell(Layout(4, cp=4), {**GPT, "sink": "kv_bias", "num_kv_heads": 2, "attention_softcap": 1.0}),
    "cp2-pp2": Cell(Layout(4, cp=2, pp=2, accumulation=2), {"sink": "softmax1", "num_kv_heads": 2}, DOCUMENTS),
    "tp2-cp2-sp": Cell(Layout(4, tp=2, cp=2, sp=True), {"sink": "learned", "qk_norm": "head"}),
    "cp2-zero3": Cell(Layout(4, cp=2, zero=3), {"sink": "kv_bias"}),
}


# -- on the ranks --------------------------------------------------------------------------------------------------------


def sampler_of(job: jobs.Job, config: TelemetryConfig = ALONE) -> Sampler:
    return Sampler(config, job.built.controller, job.config.megastab.model.num_layers)


def widened(job: jobs.Job) -> None:
    """A sink that is not nothing at the start, at every layout alike: learned logits and biases in steps."""
    for fragment in job.built.adapter.fragments():
        if "sink" in fragment.part.name:
            first = fragment.part.start * (fragment.info.width or 1) + fragment.start
            steps = torch.arange(first, first + fragment.master.numel()).double().sin().to(fragment.master.dtype)
            for held in {id(x): x for x in (fragment.master.detach(), fragment.low) if x is not None}.values():
                held.copy_(steps.view_as(held))


def sampled(job: jobs.Job, sampler: Sampler, step: int = 1) -> Sample:
    batches = job.batches.next_step()
    with sampler.looking(step, batches):
        job.stepper.train(batches)
    sample = sampler.finish()
    assert sample is not None
    return sample


def see(configs: list[dict[str, Any]]) -> list[tuple[dict[str, Any], int]]:
    """The first step of each as its line in telemetry.jsonl, and how many layers looked on this rank."""
    heads.QUERIES = QUERIES  # type: ignore[misc]
    found = []
    see_one = AttentionWatch._see
    for config in configs:
        job, looks = jobs.start(config), Counter[int]()
        widened(job)

        def counting(self: AttentionWatch, layer: Any, *args: Any, looks: Counter[int] = looks) -> None:
            looks[layer.layer] += 1
            see_one(self, layer, *args)

        AttentionWatch._see = counting  # type: ignore[method-assign]
        line = sampled(job, sampler_of(job)).to_json()
        AttentionWatch._see = see_one  # type: ignore[method-assign]
        assert set(looks.values()) <= {1}, "once, whatever is accumulated or recomputed"
        found.append((line, len(looks)))
        job.built.engine.destroy()
    return found


@functools.cache
def seen_at(world: int) -> dict[str, list[tuple[dict[str, Any], int]]]:
    """By cell, what every rank of a job of ``world`` saw; with world 1 also the single processes the others are held against."""
    configs = {name: cell.config(cell.layout) for name, cell in CELLS.items() if cell.layout.world == world}
    if world == 1:
        configs |= {f"{name} single": cell.config(Layout(1)) for name, cell in CELLS.items()}
    by_rank = run_ranks(world, see, list(configs.values()), timeout=300.0)
    return {name: [rank[i] for rank in by_rank] for i, name in enumerate(configs)}


# -- tests ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CELLS)
def test_every_layout_sees_what_one_process_sees(name: str) -> None:
    cell = CELLS[name]
    ranks = [line for line, _ in seen_at(cell.layout.world)[name]]
    assert all(line == ranks[0] for line in ranks), "every rank knows the same"
    ((single, _),) = seen_at(1)[f"{name} single"]
    assert len(ranks[0]["attention"]) == len(single["attention"]) == 2
    has_sink = cell.model.get("sink", "none") != "none"
    for layer, (found, expected) in enumerate(zip(ranks[0]["attention"], single["attention"], strict=True)):
        assert found["layer"] == expected["layer"] == layer and ("sink_mass" in found) is has_sink
        assert found["largest_logit"] == pytest.approx(expected["largest_logit"], rel=1e-5)
        for key in {"entropy", "first_key_mass", "first_key_share", "first_key_uniform"} | ({"sink_mass"} if has_sink else set()):
            assert found[key] == pytest.approx(expected[key], abs=1e-5), key
        for key in ("largest_logit", "entropy", "first_key_mass"):
            assert len(set(found[key])) == len(found[key]) == 4, "no two heads are alike, so that none can stand for another"
    assert ranks[0]["attention"][0] != ranks[0]["attention"][1]


@pytest.mark.parametrize("name", CELLS)
def test_only_the_replica_with_the_first_sample_looks(name: str) -> None:
    layout = CELLS[name].layout
    looks = [layers for _, layers in seen_at(layout.world)[name]]
    # rank -> (pp, dp, cp, tp), tp fastest
    is_first = [rank // (layout.tp * layout.cp) % layout.dp == 0 for rank in range(layout.world)]
    assert looks == [2 // layout.pp if first else 0 for first in is_first]


def direct(config: dict[str, Any]) -> list[tuple[list[Head], list[Head]]]:
    """For each layer what was told, and the dense softmax of what the model itself gave its attention; its output too."""
    from megastab.model import attention

    job = jobs.start(config)
    widened(job)
    attend, kept = attention.attend, []
    layers = [module for module in job.built.engine.module.modules() if isinstance(module, attention.Attention)]
    sinks = [sink_of(layer) for layer in layers]  # before the step moves them

    def keeping(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, call: Any) -> Tensor:
        attention.attend = attend  # which calls itself, document by document
        out = attend(q, k, v, documents, call)
        attention.attend = keeping
        kept.append([x[0].detach().clone() for x in (q, k, v, out)] + [None if documents is None else documents[0].tolist()])
        return out

    attention.attend = keeping
    sample = sampled(job, sampler_of(job))
    attention.attend = attend
    return [(list(sample.attention[layer.layer]), oracle(layer, sinks[layer.layer], *kept[layer.layer])) for layer in layers]


def sink_of(layer: Any) -> Any:
    """[N] fp64 of logits, or [K, H] keys and values, or None."""
    if layer.has_softmax1:
        return np.zeros(layer.num_heads)
    term = layer._term(torch.zeros(1, 1, layer.num_heads, layer.head_dim), Axis())
    if term is None or isinstance(term, Tensor):
        return None if term is None else term.detach().double().numpy().copy()
    return tuple(x.detach().double().numpy().copy() for x in term)


def oracle(layer: Any, term: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor, documents: list[int] | None) -> list[Head]:
    seq, num_heads, width = q.shape
    last = list(range(seq))
    first = [0 if documents is None else documents.index(documents[i]) for i in last]
    sink = value = None
    if isinstance(term, tuple):
        key, value = (x[[head * len(x) // num_heads for head in range(num_heads)]] for x in term)
        sink = np.einsum("qnh,nh->nq", q.double().numpy(), key) / math.sqrt(width)
        sink = sink if layer.cap is None else layer.cap * np.tanh(sink / layer.cap)
    elif term is not None:
        sink = np.repeat(term[:, None], seq, 1)
    check_output(layer, (q, k, v, out), first, sink, value)
    return dense(q, k, first, last, sink, layer.cap)


def check_output(layer: Any, tensors: tuple[Tensor, ...], first: list[int], sink: Any, value: Any) -> None:
    """That the oracle's weights are the model's: they give its output."""
    q, k, v, out = (x.double().numpy() for x in tensors)
    for head in range(q.shape[1]):
        kv = head * k.shape[1] // q.shape[1]
        for i in range(len(q)):
            x = k[first[i] : i + 1, kv] @ q[i, head] / math.sqrt(q.shape[2])
            p = np.exp(x if layer.cap is None else layer.cap * np.tanh(x / layer.cap))
            at_sink = 0.0 if sink is None else math.exp(sink[head, i])
            mixed = p @ v[first[i] : i + 1, kv] + (0.0 if value is None else at_sink * value[head])
            coarse = 2e-2 if tensors[0].dtype == torch.bfloat16 else 1e-5  # the output is rounded to it, and the softmax before
            assert mixed / (p.sum() + at_sink) == pytest.approx(out[i, head], rel=coarse, abs=coarse)


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("cap", [None, 0.5])
def test_it_is_the_models_own_softmax(sink: str, dtype: str, cap: float | None) -> None:
    model = {"sink": sink, "attention_softcap": cap, "num_kv_heads": 2, "qk_norm": "head" if sink == "kv_bias" else "none"}
    # Bf16 queries and keys are looked at as they are, in fp32: no looser.
    (found,) = run_ranks(1, direct, config_of(Layout(1), dtype=dtype, model=model, **(DOCUMENTS if sink != "softmax1" else {})))
    assert len(found) == 2
    for told, expected in found:
        assert np.array(told) == pytest.approx(np.array(expected), rel=1e-5, abs=1e-6, nan_ok=True)


def compiled() -> list[int]:
    """Layers seen in sampled steps of a compiled model, with a plain step between them."""
    job = jobs.start(config_of(Layout(1, compile=True)))
    sampler = sampler_of(job)
    first = len(sampled(job, sampler).attention[1])
    job.step()
    sample = sampled(job, sampler, 3)
    return [first, len([heads for heads in sample.attention.values() if heads[0].entropy > 0])]


def test_compiled_layers_are_seen() -> None:
    assert run_ranks(1, compiled, timeout=300.0) == [[4, 2]]


def interrupted() -> list[bool]:
    from megastab.model.attention import Attention

    job = jobs.start(config_of(Layout(1)))
    sampler, batches = sampler_of(job), job.batches.next_step()
    layers = [module for module in job.built.engine.module.modules() if isinstance(module, Attention)]
    with pytest.raises(RuntimeError, match="boom"), sampler.looking(1, batches):
        during = all(layer.look is not None for layer in layers)
        raise RuntimeError("boom")
    return [during, all(layer.look is None for layer in layers)]


def test_an_error_in_the_step_leaves_nothing_looking() -> None:
    assert run_ranks(1, interrupted) == [[True, True]]
