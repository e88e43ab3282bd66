"""AdamW against OrthoAdam under two norms: validation loss, kurtosis and size of activations by layer, what rounding costs.

python docs/experiments/rotation.py [--full | --smoke | --probe] [--also KEY=VALUE] [--jobs N]
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pictures import draw_grid
from small_runs import (
    DATA,
    HERE,
    ROOT,
    SEQ,
    VOCAB,
    Run,
    cpu_minutes,
    markdown,
    mean,
    measured_outcome,
    prepare_data,
    run_all,
    shortened,
    valid_loss,
    write_into,
)

RECIPE = ("megastab.model.init.std=0.08", "optimizer.params.betas=[0.9,0.95]", "optimizer.params.weight_decay=0.1")
RATE, STEPS, WARMUP = 6e-3, 1000, 100
FULL_RATES, FULL_STEPS = (1e-3, 3e-3, 1e-2), 10_000
PROBE_RATES, PROBE_STEPS = (1e-3, 3e-3, 6e-3), 300
SAMPLES, CALIBRATION = 64, 32  # of validation: looked at; and the next ones, for the scales of rounded activations


def ortho(rotation: str, axes: str) -> tuple[str, ...]:
    """The overrides."""
    return ("optimizer.type=OrthoAdam", f"optimizer.params.rotation={rotation}", f"optimizer.params.axes={axes}")


OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "AdamW": (),
    "hadamard, last": ortho("hadamard", "last"),
    "haar, last": ortho("haar", "last"),
    "hadamard, both": ortho("hadamard", "both"),
}
NORMS: dict[str, tuple[str, ...]] = {"RMSNorm": (), "scalar gain": ("megastab.model.norm=rmsnorm_scalar",)}
CELLS = {f"{optimizer}; {norm}": (*more, *NORMS[norm]) for norm in NORMS for optimizer, more in OPTIMIZERS.items()}
PER_MATRIX = (*ortho("haar", "last"), "optimizer.params.haar_per=parameter")  # elsewhere all rows of a width share one Q
BUT_VOCABULARY = (*ortho("hadamard", "both"), "optimizer.params.max_axis=1024")  # the vocabulary is the one longer axis
CELLS |= {"haar per matrix, last; RMSNorm": PER_MATRIX, "hadamard, both but vocabulary; RMSNorm": BUT_VOCABULARY}
ONE_SEED = tuple(cell for cell in CELLS if "per matrix" in cell or "but vocabulary" in cell)  # asked afterwards; --full has no exceptions
FULL_CELLS = CELLS | {
    "haar per matrix, last; scalar gain": (*PER_MATRIX, *NORMS["scalar gain"]),
    "hadamard, both but vocabulary; scalar gain": (*BUT_VOCABULARY, *NORMS["scalar gain"]),
    **{f"haar, both; {norm}": (*ortho("haar", "both"), *more) for norm, more in NORMS.items()},
}


def slug(text: str) -> str:
    """A folder's name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def training_run(cell: str, rate: float, seed: int, steps: int, place: str, also: Sequence[str] = ()) -> Run:
    """One run; its seed is also the rotation's. Four checkpoints on the way are looked at and thrown away."""
    overrides = [*RECIPE, *FULL_CELLS[cell], f"optimizer.params.lr={rate}", f"megastab.schedule.warmup_steps={min(WARMUP, steps // 2)}"]
    if "optimizer.type=OrthoAdam" in overrides:
        overrides.append(f"optimizer.params.seed={seed}")
    overrides += [f"megastab.run.seed={seed}", f"megastab.run.total_steps={steps}", f"megastab.run.save_interval={max(1, steps // 4)}"]
    return Run(f"{place}/{slug(cell)}-lr{rate:g}-seed{seed}", (*overrides, *also))


def measure(folder: Path) -> dict[str, Any]:
    """Of every checkpoint the means over blocks; of the last one every layer, and what rounding adds to the loss of its samples."""
    import torch
    from hidden_states import statistics_by_layer
    from rounding import KINDS, largest_inputs, rounded

    from megastab.data.batches import assemble
    from megastab.data.blend import open_blend
    from megastab.engine.inference import load_for_inference

    started = time.process_time()
    valid = open_blend([(1.0, str(ROOT / DATA / "text_valid"))], SEQ, seed=0, vocab_size=VOCAB, shuffle=False)
    looked_at = assemble(valid, 0, SAMPLES, document_mask=False)
    calibration = assemble(valid, SAMPLES, CALIBRATION, document_mask=False)

    @torch.no_grad()
    def loss(model: torch.nn.Module) -> float:
        return float(model(looked_at.tokens, looked_at.labels, looked_at.weights) / looked_at.weights.sum())

    course: dict[str, dict[str, float]] = {}
    for checkpoint in sorted((folder / "checkpoints").glob("step*")):
        model = load_for_inference(checkpoint).model
        layers = statistics_by_layer(model, looked_at.tokens)
        course[str(int(checkpoint.name.removeprefix("step")))] = over_blocks(layers)
    largest, plain = largest_inputs(model, calibration.tokens), loss(model)
    added = {kind: loss(rounded(model, kind, largest)) - plain for kind in KINDS}
    basis = shared_axes(folder)
    own = None if basis is None else over_blocks(statistics_by_layer(model, looked_at.tokens, basis))["kurtosis_turned"]
    by_layer = {key: [layer[key] for layer in layers] for key in layers[0]}
    seconds = time.process_time() - started
    return {"layers": by_layer, "kurtosis_own": own, "course": course, "rounding": added, "measuring_seconds": seconds}


def shared_axes(folder: Path) -> Any:
    """[D, D], states times which are in the coordinates the optimizer's moments live in; None where matrices do not share them."""
    import torch

    from megastab import OrthoAdam

    config = json.loads((folder / "config.json").read_text())
    params, width = config["optimizer"]["params"], config["megastab"]["model"]["hidden_size"]
    if params.get("rotation") != "haar" or params.get("haar_per") == "parameter":
        return None
    optimizer = OrthoAdam([torch.nn.Parameter(torch.zeros(1, width))], rotation="haar", seed=params["seed"])
    return optimizer.rotation_for("any", width).forward(torch.eye(width)).double()


def over_blocks(layers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of the residual stream behind the blocks: means, but the largest of ``largest``."""
    blocks = layers[1:]
    means = {key: mean([block[key] for block in blocks]) for key in blocks[0]}
    return {**means, "largest": max(block["largest"] for block in blocks)}


def at_end(fact: Mapping[str, Any]) -> Mapping[str, float]:
    """The means over blocks of the last checkpoint."""
    last: Mapping[str, float] = list(fact["course"].values())[-1]
    return last


def facts(run: Run) -> dict[str, Any]:
    """The figures of one run."""
    outcome = measured_outcome(run)
    costs = {"cpu_seconds": outcome["cpu_seconds"], "command": outcome["command"]}
    return {"valid_loss": valid_loss(run), **outcome["measured"], **costs}


HEADER = (
    *("optimizer; norm", "validation loss", "each seed", "kurtosis, first token", "each seed", "rest", "each seed"),
    *("rest, turned", "rest, own axes", "largest", "each seed", "/ median", "W4", "W8A8", "W4A8", "W4A4"),
)


def row(cell: str, each: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line of the page's table: means over the seeds, and the seeds themselves."""
    valid, last = [x["valid_loss"] for x in each], [at_end(x) for x in each]
    cells = [f"**{mean(valid):.4f}**", " / ".join(f"{x:.4f}" for x in valid)]
    for key, digits in (("kurtosis_first", 2), ("kurtosis_rest", 2)):
        values = [x[key] for x in last]
        cells += [f"{mean(values):.{digits}f}", " / ".join(f"{x:.{digits}f}" for x in values)]
    largest = [x["largest"] for x in last]
    own = [x["kurtosis_own"] for x in each]
    cells += [f"{mean([x['kurtosis_turned'] for x in last]):.2f}", "-" if None in own else f"{mean(own):.2f}"]
    cells += [f"{mean(largest):.1f}", " / ".join(f"{x:.1f}" for x in largest)]
    cells.append(f"{mean([ratio(x['layers']) for x in each]):.0f}")
    return [cell, *cells, *(f"{mean([x['rounding'][kind] for x in each]):.4f}" for kind in each[0]["rounding"])]


def ratio(layers: Mapping[str, Sequence[float]]) -> float:
    """The largest over the median of the block where that is worst."""
    return max(top / middle for top, middle in zip(layers["largest"][1:], layers["median"][1:], strict=True))


def publish(table: dict[float, dict[str, list[Run]]], place: str) -> None:
    """JSON, the page's table and the picture."""
    figures = {rate: {cell: [facts(run) for run in runs] for cell, runs in by.items()} for rate, by in table.items()}
    tables = [f"lr {rate:g}\n\n" + markdown(HEADER, [row(c, each) for c, each in by.items()]) for rate, by in figures.items()]
    looking = sum(x["measuring_seconds"] for by in figures.values() for each in by.values() for x in each) / 60
    spent = f"{cpu_minutes(place):.0f} CPU-minutes for these runs, {looking:.1f} for looking at them"
    text = "\n\n".join(tables) + f"\n\n{spent}, {cpu_minutes('rotation-probe'):.0f} for the probes."
    print(text)
    if place != "rotation":
        return
    ((rate, by_cell),) = figures.items()
    (HERE / "rotation.json").write_text(json.dumps(shortened({"lr": rate, "cells": by_cell}), indent=1) + "\n")
    write_into(HERE / "rotation.md", "table", text)
    draw(by_cell, HERE / "rotation.png")


def draw(by_cell: Mapping[str, Sequence[Mapping[str, Any]]], out: Path) -> None:
    """The picture: means over seeds as lines, every seed as a dot."""

    def layers(key: str) -> dict[str, list[float]]:
        return {cell: [mean(values) for values in zip(*(x["layers"][key] for x in each), strict=True)] for cell, each in by_cell.items()}

    panels = {
        "kurtosis, first token": layers("kurtosis_first"),
        "kurtosis, all other tokens": layers("kurtosis_rest"),
        "largest |activation|": layers("largest"),
    }
    dots = {
        "kurtosis, other tokens, mean of blocks": {c: [at_end(x)["kurtosis_rest"] for x in each] for c, each in by_cell.items()},
        "loss added by W4A4 [nats/token]": {c: [x["rounding"]["W4A4"] for x in each] for c, each in by_cell.items()},
        "validation loss [nats/token]": {c: [x["valid_loss"] for x in each] for c, each in by_cell.items()},
    }
    draw_grid(panels, dots, "scalar gain", out)


def probe(jobs: int) -> None:
    """Short runs at three learning rates: does OrthoAdam want another one?"""
    cells = [f"{optimizer}; RMSNorm" for optimizer in ("AdamW", "hadamard, last")]
    runs = {c: [training_run(c, rate, 1, PROBE_STEPS, "rotation-probe") for rate in PROBE_RATES] for c in cells}
    run_all([run for each in runs.values() for run in each], jobs)
    rows = [[cell, *(f"{valid_loss(run):.4f}" for run in each)] for cell, each in runs.items()]
    text = markdown(("validation loss", *(f"lr {rate:g}" for rate in PROBE_RATES)), rows)
    print(text)
    write_into(HERE / "rotation.md", "probes", text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="also haar on both axes, three rates, four seeds, ten times the tokens")
    size.add_argument("--smoke", action="store_true", help="two steps of everything; the figures mean nothing")
    size.add_argument("--probe", action="store_true", help="only the learning rates")
    parser.add_argument("--also", action="append", default=[], metavar="KEY=VALUE", help="one more override of every run; repeatable")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    arguments = parser.parse_args()
    prepare_data()
    if arguments.probe:
        return probe(arguments.jobs)
    place, cells, seeds, steps = "rotation", list(CELLS), (1, 2), STEPS
    rates: tuple[float, ...] = (RATE,)
    if arguments.full:
        place, cells, rates, seeds, steps = "rotation-full", list(FULL_CELLS), FULL_RATES, (1, 2, 3, 4), FULL_STEPS
    elif arguments.smoke:
        place, seeds, steps = "smoke-rotation", (1,), 2
    place = "-".join((place, *map(slug, arguments.also)))  # other runs, which the page knows nothing of

    def each_seed(cell: str, rate: float) -> list[Run]:
        wanted = seeds[:1] if cell in ONE_SEED and not arguments.full else seeds
        return [training_run(cell, rate, seed, steps, place, arguments.also) for seed in wanted]

    table = {rate: {cell: each_seed(cell, rate) for cell in cells} for rate in rates}
    for number in range(len(seeds)):  # all of one seed first: an interrupted experiment has a whole table
        run_all([run for by in table.values() for runs in by.values() for run in runs[number : number + 1]], arguments.jobs, measure)
    publish(table, place)


if __name__ == "__main__":
    main()
