"""Target variance rescaling with and without, from two initialisations: weight deviations, largest activations, validation loss.

python docs/experiments/variance.py [--full | --smoke] [--jobs N]
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pictures import draw_layers
from small_runs import BATCH, DATA, HERE, ROOT, SEQ, VOCAB, Run, cpu_minutes, markdown, mean, outcome_of, prepare_data, run_all, write_into

from megastab.report.history import read_history

NORMAL = ("megastab.model.init.scheme=normal", "megastab.model.init.std=0.02")
LIR = ("megastab.model.init.scheme=lir", "megastab.model.init.std=0.006")

WIDE_NORMAL = ("megastab.model.init.scheme=normal", "megastab.model.init.std=0.08")
WIDE_LIR = ("megastab.model.init.scheme=lir", "megastab.model.init.std=0.024")


def tvr(target: float) -> tuple[str, ...]:
    """The overrides. A look every 10 steps, so that no look has much to take away."""
    return (f"megastab.stability.tvr.target_std={target}", "megastab.stability.tvr.interval_steps=10")


# 0.08, 0.024 and 0.04 are the paper's 0.02, 0.006 and 0.01 taken from width 2048 to 128: std times sqrt(width) is a layer's gain.
VARIANTS: dict[str, tuple[str, ...]] = {
    "init .02": NORMAL,
    "init .02 + TVR .02": (*NORMAL, *tvr(0.02)),
    "init .006 LIR": LIR,
    "init .006 LIR + TVR .01": (*LIR, *tvr(0.01)),
    "init .006 LIR + TVR .04": (*LIR, *tvr(0.04)),
    "init .04": ("megastab.model.init.scheme=normal", "megastab.model.init.std=0.04"),
    "init .08": WIDE_NORMAL,
    "init .08 + TVR .04": (*WIDE_NORMAL, *tvr(0.04)),
    "init .024 LIR": WIDE_LIR,
    "init .024 LIR + TVR .04": (*WIDE_LIR, *tvr(0.04)),
}
RATES = (3e-3,)
FULL_RATES = (1e-3, 3e-3, 1e-2)


def training_run(variant: str, rate: float, seed: int, steps: int, place: str) -> Run:
    """One run."""
    name = re.sub(r"[^a-z0-9.]+", "-", variant.lower())
    common = (f"optimizer.params.lr={rate}", f"megastab.run.seed={seed}", f"megastab.run.total_steps={steps}")
    return Run(f"{place}/{name}-lr{rate:g}-seed{seed}", (*VARIANTS[variant], *common))


def measure(folder: Path) -> dict[str, list[float]]:
    """By layer, of the last checkpoint: mean std of the seven matrices, and largest absolute value of the residual after the block."""
    import torch

    from megastab.checkpoint.weights import FOLDER, merged_weights
    from megastab.data.batches import assemble
    from megastab.data.blend import open_blend
    from megastab.engine.inference import find_checkpoint, load_for_inference

    checkpoint = find_checkpoint(folder)
    by_layer: dict[int, list[float]] = defaultdict(list)
    for name, matrix in merged_weights(checkpoint / FOLDER):
        found = re.match(r"layers\.(\d+)\.", name)
        if found and matrix.ndim == 2:
            by_layer[int(found[1])].append(float(matrix.double().std()))
    model = load_for_inference(checkpoint).model
    largest = [math.nan] * len(model.blocks)
    for layer, block in enumerate(model.blocks):

        def keep(_module: Any, _inputs: Any, out: torch.Tensor, layer: int = layer) -> None:
            largest[layer] = float(out.abs().max())

        block.register_forward_hook(keep)
    valid = open_blend([(1.0, str(ROOT / DATA / "text_valid"))], SEQ, seed=0, vocab_size=VOCAB, shuffle=False)
    with torch.no_grad():
        model.logits(assemble(valid, 0, 4 * BATCH, document_mask=False).tokens)
    return {"weight_std": [mean(by_layer[layer]) for layer in sorted(by_layer)], "largest_residual": largest}


def facts(run: Run) -> dict[str, Any]:
    """The figures of one run."""
    history, outcome = read_history(run.folder), outcome_of(run)
    values = history.evaluated("valid_loss")[1]
    rescaled = sum(int(x) for x in history.column("rescaled"))
    measured = outcome.get("measured", {"weight_std": [math.nan], "largest_residual": [math.nan]})
    valid = values[-1] if values else math.inf
    return {"valid_loss": valid, "rescaled": rescaled, **measured, "cpu_seconds": outcome["cpu_seconds"], "command": outcome["command"]}


HEADER = ("variant", "validation loss", "each seed", "weight std, first layer", "last layer", "largest residual", "each seed", "rescales")


def row(variant: str, runs: Sequence[Run]) -> list[str]:
    """One line of the page's table: means over the seeds, and the seeds themselves."""
    each = [facts(run) for run in runs]
    valid, top = [x["valid_loss"] for x in each], [max(x["largest_residual"]) for x in each]
    first, last = (mean([x["weight_std"][layer] for x in each]) for layer in (0, -1))
    cells = [f"**{mean(valid):.4f}**", " / ".join(f"{x:.4f}" for x in valid), f"{first:.4f}", f"{last:.4f}"]
    cells += [f"{mean(top):.1f}", " / ".join(f"{x:.1f}" for x in top), " / ".join(str(x["rescaled"]) for x in each)]
    return [variant, *cells]


def publish(table: dict[float, dict[str, list[Run]]], place: str) -> None:
    """JSON, the page's table and the picture."""
    tables = (f"lr {rate:g}\n\n" + markdown(HEADER, [row(v, runs) for v, runs in by.items()]) for rate, by in table.items())
    text = "\n\n".join(tables) + f"\n\n{cpu_minutes(place):.0f} CPU-minutes."
    print(text)
    if place != "variance":
        return
    ((rate, by_variant),) = table.items()
    figures = {v: [facts(run) for run in runs] for v, runs in by_variant.items()}
    (HERE / "variance.json").write_text(json.dumps({"lr": rate, "variants": figures}, indent=1) + "\n")
    write_into(HERE / "variance.md", "table", text)

    def by_layer(key: str) -> dict[str, list[float]]:
        return {v: [mean(values) for values in zip(*(x[key] for x in each), strict=True)] for v, each in figures.items()}

    panels = {"weight std (mean of 7 matrices and of seeds)": by_layer("weight_std"), "largest |residual|": by_layer("largest_residual")}
    draw_layers(panels, {v: [x["valid_loss"] for x in each] for v, each in figures.items()}, HERE / "variance.png")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="three learning rates, four seeds, five times the tokens")
    size.add_argument("--smoke", action="store_true", help="two steps of everything; the figures mean nothing")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    arguments = parser.parse_args()
    prepare_data()
    place, seeds, steps = "variance", [1, 2], 240
    rates: tuple[float, ...] = RATES
    if arguments.full:
        place, rates, seeds, steps = "variance-full", FULL_RATES, [1, 2, 3, 4], 2000
    elif arguments.smoke:
        place, seeds, steps = "smoke-variance", [1], 2
    table = {rate: {v: [training_run(v, rate, seed, steps, place) for seed in seeds] for v in VARIANTS} for rate in rates}
    for seed in range(len(seeds)):  # all of one seed first: an interrupted experiment has a whole table
        run_all([runs[seed] for by in table.values() for runs in by.values()], arguments.jobs, measure)
    publish(table, place)


if __name__ == "__main__":
    main()
