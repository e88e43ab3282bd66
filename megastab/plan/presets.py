"""The table of docs/planning.md, as Markdown: ``python -m megastab.plan.presets [--cluster h100]``; some minutes of arithmetic."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from megastab.config.load import load_config
from megastab.plan.cluster import cluster_named
from megastab.plan.cluster_text import cells
from megastab.plan.command import spread
from megastab.plan.search import search

# (name, layers, width, heads, KV heads, MLP width, vocabulary, sequence, samples of a step)
SHAPES: tuple[tuple[str, int, int, int, int, int, int, int, int], ...] = (
    ("7B", 32, 4096, 32, 32, 11008, 32000, 4096, 1024),  # LLaMA, arXiv 2302.13971; sequence and vocabulary of Llama 2
    ("13B", 40, 5120, 40, 40, 13824, 32000, 4096, 1024),
    ("70B", 80, 8192, 64, 8, 28672, 32000, 4096, 1024),  # Llama 2, arXiv 2307.09288
    ("405B", 126, 16384, 128, 8, 53248, 128256, 8192, 2048),  # Llama 3, arXiv 2407.21783
)
GPUS = (8, 64, 512, 4096)


def config_of(layers: int, width: int, heads: int, kv_heads: int, mlp: int, vocabulary: int, sequence: int, samples: int) -> dict[str, Any]:
    """A bf16 run of AdamW with every trap's default."""
    model = {
        "arch": "llama", "num_layers": layers, "hidden_size": width, "num_heads": heads, "num_kv_heads": kv_heads,
        "ffn_hidden_size": mlp, "vocab_size": vocabulary, "max_seq_len": sequence,
    }  # fmt: skip
    return {
        "train_batch_size": samples,
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 50_000_000},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "weight_decay": 0.1}},
        "megastab": {"model": model, "run": {"total_steps": 1000}},
    }


def main() -> None:
    """One row a shape and size, in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cluster", default="h100", metavar="NAME|FILE", help="its nodes, in as many as are asked for")
    arguments = parser.parse_args()

    one = cluster_named(arguments.cluster)
    print("| model | GPUs | tp | cp | pp | dp | ZeRO | recompute | micro-batch | memory | step | MFU |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for name, *shape in SHAPES:
        for gpus in GPUS:
            cluster = replace(one, nodes=max(1, gpus // one.gpus_per_node))
            found = search(spread(load_config(config_of(*shape), world_size=1), cluster), cluster)
            row = cells(found.fitting[0]) if found.fitting else ["fits nowhere", *[""] * 9]
            print("| " + " | ".join([name, str(gpus), *row]) + " |", flush=True)


if __name__ == "__main__":
    main()
