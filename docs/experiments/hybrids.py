"""The six hybrids of configs/hybrids at 1.8 M parameters: massive activations, attention to the first token, loss, what rounding costs.

python docs/experiments/hybrids.py [--full | --smoke | --probe] [--jobs N]
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attention_shares import uniform
from hybrid_pictures import draw_blocks
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

from megastab.report.history import read_history

# hybrid -> its file in configs/hybrids without llama_2m_, what differs from it
HYBRIDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "baseline": ("baseline", ()),
    "kv_bias": ("kv_bias", ()),
    "dyt": ("dyt", ()),
    "tvr": ("tvr", ()),
    "kv_bias + tvr": ("kv_bias_tvr", ()),
    "dyt + tvr": ("dyt_tvr", ()),
}
# The paper's DyT runs start from .02, the others from .006; times sqrt(2048 / 128) these are .08 and the configs' .024.
WIDE = ("megastab.model.init.std=0.08",)
SCALED = ("megastab.model.embedding_multiplier=11.3",)  # where DyT's learned scale of the embedding starts
CONTROLS: dict[str, tuple[str, tuple[str, ...]]] = {  # on the first seed alone
    "baseline, init .08": ("baseline", WIDE),
    "dyt, init .08": ("dyt", WIDE),
    "baseline, init .08, embedding x 11.3": ("baseline", (*WIDE, *SCALED)),
}
CELLS = HYBRIDS | CONTROLS
RATE, STEPS = 3e-3, 600  # the configs' learning rate
FULL_RATES, FULL_STEPS = (1e-3, 3e-3, 6e-3), 10_000
PROBED, PROBE_RATES, PROBE_STEPS = ("baseline", "dyt", "dyt, init .08"), (1e-3, 3e-3, 6e-3), 200
SAMPLES, CALIBRATION = 64, 32  # of validation: looked at; and the next ones, for the scales of rounded activations
LARGE, OUTSTANDING = 100.0, 1000.0  # arXiv 2503.22329: massive is above the one and this many times the median


@dataclass(frozen=True)
class HybridRun(Run):
    """A run of a config of its own."""

    config: str

    @property
    def command(self) -> list[str]:
        """As typed in the root of the checkout."""
        program, script, option, _, *overrides = super().command
        return [program, script, option, self.config, *overrides]


def training_run(hybrid: str, rate: float, seed: int, steps: int, place: str) -> Run:
    """One run. Four checkpoints on the way are looked at and thrown away."""
    name = re.sub(r"[^a-z0-9.]+", "-", hybrid)
    overrides = (f"optimizer.params.lr={rate}", f"megastab.run.seed={seed}", f"megastab.run.total_steps={steps}")
    save = f"megastab.run.save_interval={max(1, steps // 4)}"
    config, more = CELLS[hybrid]
    return HybridRun(f"{place}/{name}-lr{rate:g}-seed{seed}", (*overrides, save, *more), f"configs/hybrids/llama_2m_{config}.json")


def measure(folder: Path) -> dict[str, Any]:
    """Every layer of every checkpoint; of the last one also what rounding adds to the loss of its samples."""
    import torch
    from attention_shares import shares_by_layer
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

    course: dict[str, dict[str, list[float]]] = {}
    for checkpoint in sorted((folder / "checkpoints").glob("step*")):
        model = load_for_inference(checkpoint).model
        states, attention = statistics_by_layer(model, looked_at.tokens)[1:], shares_by_layer(model, looked_at.tokens)  # blocks alone
        layers = [state | share for state, share in zip(states, attention, strict=True)]
        course[str(int(checkpoint.name.removeprefix("step")))] = {key: [layer[key] for layer in layers] for key in layers[0]}
    largest, plain = largest_inputs(model, calibration.tokens), loss(model)
    added = {kind: loss(rounded(model, kind, largest)) - plain for kind in KINDS}
    return {"course": course, "rounding": added, "measuring_seconds": time.process_time() - started}


def at_end(fact: Mapping[str, Any]) -> Mapping[str, list[float]]:
    """{quantity: of each block} of the last checkpoint."""
    last: Mapping[str, list[float]] = list(fact["course"].values())[-1]
    return last


def ratios(layers: Mapping[str, Sequence[float]]) -> list[float]:
    """Largest absolute value over the median one, by block."""
    return [top / middle for top, middle in zip(layers["largest"], layers["median"], strict=True)]


def massive_blocks(layers: Mapping[str, Sequence[float]]) -> tuple[int, int, int]:
    """Blocks whose largest value is above 100, is 1000 times the median, is both."""
    facts = [(top > LARGE, ratio >= OUTSTANDING) for top, ratio in zip(layers["largest"], ratios(layers), strict=True)]
    return sum(a for a, _ in facts), sum(b for _, b in facts), sum(a and b for a, b in facts)


def facts(run: Run) -> dict[str, Any]:
    """The figures of one run."""
    outcome = measured_outcome(run)
    rescaled = sum(int(x) for x in read_history(run.folder).column("rescaled"))
    costs = {"cpu_seconds": outcome["cpu_seconds"], "command": outcome["command"]}
    return {"valid_loss": valid_loss(run), "rescaled": rescaled, **outcome["measured"], **costs}


HEADER = (
    *("hybrid", "validation loss", "each seed", "largest", "each seed", "median there", "largest / median", "each seed"),
    *("blocks > 100, >= 1000 x median, both", "kurtosis, first token", "rest", "weight on first token", "each seed", "on the bias"),
    *("first token wins", "W8A8", "W4", "W4A8", "W4A4", "rescales"),
)


def row(hybrid: str, each: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line of the page's table: means over the seeds, and the seeds themselves."""
    valid, last = [x["valid_loss"] for x in each], [at_end(x) for x in each]
    largest, worst = [max(x["largest"]) for x in last], [max(ratios(x)) for x in last]
    median = [x["median"][x["largest"].index(top)] for x, top in zip(last, largest, strict=True)]
    cells = [f"**{mean(valid):.4f}**", " / ".join(f"{x:.4f}" for x in valid)]
    cells += [f"{mean(largest):.1f}", " / ".join(f"{x:.1f}" for x in largest), f"{mean(median):.3f}"]
    cells += [f"{mean(worst):.0f}", " / ".join(f"{x:.0f}" for x in worst)]
    cells.append(" / ".join(", ".join(map(str, massive_blocks(x))) for x in last))
    cells += [f"{over_blocks(last, key):.2f}" for key in ("kurtosis_first", "kurtosis_rest")]
    cells += [f"{over_blocks(last, 'first'):.3f}", " / ".join(f"{mean(x['first']):.3f}" for x in last)]
    cells += [f"{over_blocks(last, 'bias'):.3f}" if hybrid in BIASED else "-", f"{over_blocks(last, 'first_wins'):.3f}"]
    cells += [f"{mean([x['rounding'][kind] for x in each]):.4f}" for kind in ("W8A8", "W4", "W4A8", "W4A4")]
    return [hybrid, *cells, " / ".join(str(x["rescaled"]) for x in each) if "tvr" in hybrid else "-"]


BIASED = tuple(hybrid for hybrid in CELLS if "kv_bias" in hybrid)
PANELS: dict[str, Callable[[Mapping[str, list[float]]], list[float]]] = {
    "largest |activation|": lambda layers: layers["largest"],
    "largest / median": ratios,
    "kurtosis, all tokens but the first": lambda layers: layers["kurtosis_rest"],
    "attention to the first token": lambda layers: layers["first"],
    "attention to the bias": lambda layers: layers["bias"],
}
DOTS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "loss added by W8A8 [nats/token]": lambda fact: fact["rounding"]["W8A8"],
    "loss added by W4A4 [nats/token]": lambda fact: fact["rounding"]["W4A4"],
    "validation loss [nats/token]": lambda fact: fact["valid_loss"],
}
LINES = {"largest |activation|": LARGE, "largest / median": OUTSTANDING, "attention to the first token": uniform(SEQ)}


def over_blocks(each: Sequence[Mapping[str, Sequence[float]]], key: str) -> float:
    """Mean over blocks and seeds."""
    return mean([value for layers in each for value in layers[key]])


def publish(table: dict[float, dict[str, list[Run]]], place: str) -> None:
    """JSON, the page's table and the picture."""
    figures = {rate: {h: [facts(run) for run in runs] for h, runs in by.items()} for rate, by in table.items()}
    tables = [f"lr {rate:g}\n\n" + markdown(HEADER, [row(h, each) for h, each in by.items()]) for rate, by in figures.items()]
    looks = sum(x["measuring_seconds"] for by in figures.values() for each in by.values() for x in each) / 60
    spent = f"{cpu_minutes(place):.0f} CPU-minutes, {looks:.0f} more to look at the checkpoints"
    text = "\n\n".join([*tables, f"{spent}, {cpu_minutes('hybrids-probe'):.0f} for the probes."])
    print(text)
    if place != "hybrids":
        return
    ((rate, by_hybrid),) = figures.items()
    (HERE / "hybrids.json").write_text(json.dumps({"lr": rate, "hybrids": shortened(by_hybrid)}, indent=1) + "\n")
    write_into(HERE / "hybrids.md", "table", text)
    by_block: dict[str, dict[str, list[list[float]]]] = {}
    for title, value in PANELS.items():
        by_block[title] = {h: [value(at_end(x)) for x in each] for h, each in by_hybrid.items() if h in BIASED or "bias" not in title}
    by_seed = {title: {h: [float(value(x)) for x in each] for h, each in by_hybrid.items()} for title, value in DOTS.items()}
    draw_blocks(by_block, by_seed, LINES, HERE / "hybrids.png")


def probe(jobs: int) -> None:
    """Short runs at three learning rates: does DyT want another one?"""
    runs = {h: [training_run(h, rate, 1, PROBE_STEPS, "hybrids-probe") for rate in PROBE_RATES] for h in PROBED}
    run_all([run for each in runs.values() for run in each], jobs)
    rows = [[hybrid, *(f"{valid_loss(run):.4f}" for run in each)] for hybrid, each in runs.items()]
    text = markdown(("validation loss", *(f"lr {rate:g}" for rate in PROBE_RATES)), rows)
    print(text)
    write_into(HERE / "hybrids.md", "probes", text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="three learning rates, four seeds, 10,000 steps")
    size.add_argument("--smoke", action="store_true", help="two steps of everything; the figures mean nothing")
    size.add_argument("--probe", action="store_true", help="only the learning rates")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    arguments = parser.parse_args()
    prepare_data()
    if arguments.probe:
        return probe(arguments.jobs)
    place, rates, seeds, steps = "hybrids", (RATE,), (1, 2), STEPS
    if arguments.full:
        place, rates, seeds, steps = "hybrids-full", FULL_RATES, (1, 2, 3, 4), FULL_STEPS
    elif arguments.smoke:
        place, seeds, steps = "smoke-hybrids", (1,), 2
    of_cell = {cell: seeds if cell in HYBRIDS else seeds[:1] for cell in CELLS}
    table = {rate: {c: [training_run(c, rate, seed, steps, place) for seed in of_cell[c]] for c in CELLS} for rate in rates}
    for number in range(len(seeds)):  # all of one seed first: an interrupted experiment has a whole table
        run_all([runs[number] for by in table.values() for runs in by.values() if number < len(runs)], arguments.jobs, measure)
    publish(table, place)


if __name__ == "__main__":
    main()
