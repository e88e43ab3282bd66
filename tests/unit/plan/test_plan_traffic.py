"""The plan's bytes on the wire against a log of what real ranks hand to their process groups: equal, not close."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from megastab.config.config import Config
from megastab.config.load import load_config
from megastab.plan.parameters import stages
from megastab.plan.traffic import traffic
from megastab.plan.transfer import kv_copies
from tests.layouts import Layout, config_of
from tests.ranks import run_ranks
from tests.unit.plan.wire import Entry, steps_sent

GATHERED: dict[str, Any] = {"stage3_param_persistence_threshold": 100}
PREFETCHED: dict[str, Any] = {**GATHERED, "stage3_max_reuse_distance": 0}
REUSED: dict[str, Any] = {**GATHERED, "stage3_prefetch_bucket_size": 0}
PARTLY: dict[str, Any] = {**GATHERED, "stage3_prefetch_bucket_size": 5000, "stage3_max_reuse_distance": 9000}
CROWDED: dict[str, Any] = {**PREFETCHED, "stage3_max_live_parameters": 9000}
APART: dict[str, Any] = {**GATHERED, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
NEAR: dict[str, Any] = {**GATHERED, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 3000}
DROPOUT_GPT: dict[str, Any] = {"model": {"arch": "gpt", "dropout": 0.1, "tie_embeddings": True}, "data": {"document_mask": True}}

ON_TWO: dict[str, dict[str, Any]] = {
    "tp2": config_of(Layout(2, tp=2, accumulation=2)),
    "tp2 full recompute": config_of(Layout(2, tp=2, recompute="full"), model={"num_kv_heads": 1, "qk_norm": "full", "sink": "kv_bias"}),
    "tp2 sp": config_of(Layout(2, tp=2, sp=True, accumulation=2), model={"norm": "dyt", "qk_norm": "head"}),
    "tp2 topk": config_of(Layout(2, tp=2, sp=True, recompute="selective"), model={"activation": "topk", "activation_topk": 0.6}),
    "tp2 sp zero2": config_of(Layout(2, tp=2, sp=True, zero=2, accumulation=2, recompute="full"), model={"arch": "gpt"}),
    "pp2": config_of(Layout(2, pp=2, accumulation=3)),
    "pp2 tied, side inputs": config_of(Layout(2, pp=2, accumulation=2), **DROPOUT_GPT),
    "dp2": config_of(Layout(2, accumulation=2)),
    "dp2 zero1": config_of(Layout(2, zero=1, accumulation=2)),
    "dp2 zero2": config_of(Layout(2, zero=2, accumulation=2), dtype="bf16"),
    "dp2 zero3": config_of(Layout(2, zero=3, accumulation=2), data={"document_mask": True}, model={"norm": "dyt"}),
    "dp2 zero3, prefetched": config_of(Layout(2, zero=3, accumulation=2), dtype="bf16", ds__zero_optimization=PREFETCHED),
    "dp2 zero3, reused": config_of(Layout(2, zero=3), ds__zero_optimization=REUSED),
    "dp2 zero3, partly": config_of(Layout(2, zero=3), model={"num_layers": 4}, ds__zero_optimization=PARTLY),
    "dp2 zero3, crowded": config_of(Layout(2, zero=3), model={"num_layers": 4}, ds__zero_optimization=CROWDED),
    "dp2 zero3, gathered twice": config_of(Layout(2, zero=3, accumulation=2), ds__zero_optimization=APART),
    "dp2 zero3, full recompute": config_of(Layout(2, zero=3, recompute="full"), ds__zero_optimization=APART),
    "dp2 zero3, dropout, full recompute": config_of(
        Layout(2, zero=3, recompute="full"), model={"arch": "gpt", "dropout": 0.1}, ds__zero_optimization=NEAR
    ),
    "dp2 zero3, offload": config_of(Layout(2, zero=3, offload=True)),
    "dp2 bf16": config_of(Layout(2, zero=1, accumulation=2), dtype="bf16"),
    "cp2": config_of(Layout(2, cp=2, accumulation=2), data={"document_mask": True}),
    "cp2 zero3": config_of(Layout(2, cp=2, zero=3, accumulation=2), dtype="bf16", ds__zero_optimization=APART),
    "cp2 selective": config_of(Layout(2, cp=2, recompute="selective"), model={"num_kv_heads": 1}),
    "cp2 selective, gated": config_of(Layout(2, cp=2, recompute="selective"), model={"output_gate": "head", "qk_norm": "full"}),
    "cp2 full": config_of(Layout(2, cp=2, zero=2, recompute="full", accumulation=2), model={"arch": "gpt", "sink": "kv_bias"}),
}
ON_THREE: dict[str, dict[str, Any]] = {  # shares are unequal
    "dp3 bf16": config_of(Layout(3, zero=1, accumulation=2), dtype="bf16"),
    "dp3 zero2": config_of(Layout(3, zero=2), model={"qk_norm": "full", "sink": "learned"}),
}
ON_FOUR: dict[str, dict[str, Any]] = {
    "tp2 pp2": config_of(Layout(4, tp=2, pp=2, accumulation=3)),
    "tp2 pp2 sp bf16": config_of(Layout(4, tp=2, pp=2, sp=True, accumulation=2), dtype="bf16"),
    "pp2 dp2 bf16": config_of(Layout(4, pp=2, zero=1, accumulation=2), dtype="bf16"),
    "tp2 dp2 zero1": config_of(Layout(4, tp=2, zero=1), dtype="fp16"),
    "tp2 cp2 sp": config_of(Layout(4, tp=2, cp=2, sp=True, accumulation=2, recompute="full"), model={"num_kv_heads": 2}),
    "tp2 dp2 topk": config_of(Layout(4, tp=2, accumulation=2), dtype="bf16", model={"activation": "topk", "activation_topk": 0.1}),
    "cp2 pp2": config_of(Layout(4, cp=2, pp=2, zero=1, accumulation=3), dtype="bf16", **DROPOUT_GPT),
    "cp2 dp2 zero3": config_of(Layout(4, cp=2, zero=3, accumulation=2)),
    "cp4 one kv head": config_of(Layout(4, cp=4), model={"num_kv_heads": 1, "sink": "kv_bias"}),
}


def expected(config: Config, rank: int) -> Counter[Entry]:
    """Planned bytes of a rank by (collective, ranks of the group)."""
    layout = config.layout
    tp, rest = rank % layout.tensor, rank // layout.tensor
    dp, pp = rest % layout.copies, rest // layout.copies
    first = dp // layout.context * layout.context  # of the ranks that share this one's sequences

    def at(t: int, d: int, p: int) -> int:
        return (p * layout.copies + d) * layout.tensor + t

    copies = kv_copies(config)
    groups = {
        "tensor": tuple(at(t, dp, pp) for t in range(layout.tensor)),
        "context": tuple(at(tp, d, pp) for d in range(first, first + layout.context)),
        "data": tuple(at(tp, d, pp) for d in range(layout.copies)),
        "pipeline": tuple(at(tp, dp, p) for p in range(layout.pipeline)),
        "model": tuple(at(t, dp, p) for p in range(layout.pipeline) for t in range(layout.tensor)),
        "heads": tuple(at(t, dp, pp) for t in range(tp // copies * copies, tp // copies * copies + copies)),
        "ends": (at(tp, dp, 0), at(tp, dp, layout.pipeline - 1)),
    }
    sums: Counter[Entry] = Counter()
    for transfer in traffic(config, stages(config.megastab.model, layout)[pp]):
        ranks = groups[transfer.group]
        if transfer.kind == "send":
            ranks = (at(tp, dp, pp + 1 if "next" in transfer.what else pp - 1),)
        sums[transfer.kind, ranks] += transfer.bytes
    return sums


@pytest.mark.parametrize(("world", "configs"), [(2, ON_TWO), (3, ON_THREE), (4, ON_FOUR)], ids=["two ranks", "three", "four"])
def test_planned_bytes_are_those_on_the_wire(world: int, configs: dict[str, dict[str, Any]]) -> None:
    seen = run_ranks(world, steps_sent, list(configs.values()), timeout=300)
    differing = {}
    for i, (name, source) in enumerate(configs.items()):
        config = load_config(source, world_size=world)
        for rank in range(world):
            planned, sent = expected(config, rank), seen[rank][i]
            assert sent, name
            if planned != sent:
                differing[name, rank] = {key: (planned[key], sent[key]) for key in {*planned, *sent} if planned[key] != sent[key]}
    assert not differing  # (collective, ranks): (planned, sent)
