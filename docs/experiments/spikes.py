"""Eight ways to treat a large gradient norm, in a calm regime, in one where spikes occur by themselves, and with bad batches put in.

python docs/experiments/spikes.py [--full | --smoke | --probe] [--jobs N]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pictures import draw_curves, draw_losses
from poison import Kind, poison
from small_runs import (
    BATCH,
    DATA,
    HERE,
    ROOT,
    SEQ,
    VOCAB,
    Run,
    cpu_minutes,
    markdown,
    mean,
    outcome_of,
    prepare_data,
    run_all,
    valid_loss,
    write_into,
)

from megastab.report.history import History, read_history
from megastab.report.spike_score import spike_score
from megastab.stability.loss_spikes import LossSpikes

WINDOW = 100  # of the spike score: our runs are shorter than its usual 1000
ZCLIP = "megastab.stability.zclip"
METHODS: dict[str, tuple[str, ...]] = {
    "fixed 1.0": ("gradient_clipping=1.0",),
    "ZClip released": ("gradient_clipping=1.0", f"{ZCLIP}.compat=true"),
    "ZClip hardened": ("gradient_clipping=0.0", f"{ZCLIP}={{}}"),
    "ZClip hardened, cap 1.0": ("gradient_clipping=1.0", f"{ZCLIP}={{}}"),
    "AutoClip": ("gradient_clipping=0.0", "megastab.stability.autoclip={}"),
    "AdaGC": ("gradient_clipping=0.0", "megastab.stability.adagc={}"),
    "SkipStep": ("gradient_clipping=1.0", "megastab.stability.skip_step={}"),
}
CAPS = (0.3,)  # beside 1.0, for the tuned fixed clip
RECIPE = ("optimizer.params.betas=[0.9,0.95]", "optimizer.params.weight_decay=0.1", "megastab.schedule.warmup_steps=40")
PAPER = ("optimizer.params.betas=[0.9,0.999]", "optimizer.params.weight_decay=0.01", "megastab.schedule.warmup_steps=10")
NO_WARMUP, CONSTANT = ("megastab.schedule.warmup_steps=0",), ("megastab.schedule.kind=constant",)
BAD_STEPS: dict[int, Kind] = {110: "noise", 130: "repeat", 150: "noise", 170: "repeat", 190: "noise", 210: "repeat"}


@dataclass(frozen=True)
class Condition:
    """Where the methods are compared."""

    name: str
    overrides: tuple[str, ...]
    is_poisoned: bool = False


def lr(value: float) -> str:
    """The override."""
    return f"optimizer.params.lr={value}"


# 0.08 is about 1 / sqrt(width): with the usual 0.02 a model of width 128 hardly learns in so few steps (see the probes).
INIT = ("megastab.model.init.std=0.08",)
CONDITIONS = (
    Condition("stable", (*RECIPE, *INIT, lr(3e-3))),
    Condition("edge", (*PAPER, *INIT, lr(3e-2))),
    Condition("bad-batches", (*RECIPE, *INIT, lr(3e-3)), is_poisoned=True),
)
LADDER = tuple(
    Condition(f"{kind}-{value:g}", (*settings, *INIT, lr(value)))
    for kind, settings in (("recipe", RECIPE), ("paper", PAPER))
    for value in (1e-3, 3e-3, 1e-2, 2e-2, 3e-2)
)
PROBES: dict[str, tuple[str, ...]] = {
    "recipe, lr 1e-2": (*RECIPE, lr(1e-2)),
    "paper, lr 1e-2": (*PAPER, lr(1e-2)),
    "paper, lr 3e-2": (*PAPER, lr(3e-2)),
    "recipe, lr 3e-3": (*RECIPE, lr(3e-3)),
    "paper, lr 1e-2, init .1, no warm-up": (*PAPER, lr(1e-2), *NO_WARMUP, "megastab.model.init.std=0.1"),
    "paper, lr 3e-2, 12 layers, no warm-up": (*PAPER, lr(3e-2), *NO_WARMUP, *CONSTANT, "megastab.model.num_layers=12"),
    "paper, lr rising to 1e-1, init .08": (*PAPER, lr(1e-1), "megastab.model.init.std=0.08", "megastab.schedule.warmup_steps=300"),
    "paper, lr 2e-2, constant, batch 16": (*PAPER, lr(2e-2), *CONSTANT, "train_batch_size=16"),
}


def slug(text: str) -> str:
    """A folder's name."""
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in text.lower().replace(", ", "-"))


def training_run(condition: Condition, method: str, settings: tuple[str, ...], seed: int, steps: int, place: str) -> Run:
    """One cell; the poisoned copy of the data is made where the condition asks for it."""
    overrides = [*condition.overrides, *settings, f"megastab.run.seed={seed}", f"megastab.run.total_steps={steps}"]
    if condition.is_poisoned:
        target = DATA / f"bad-{seed}" / "text_train"
        if not (ROOT / f"{target}.idx").exists():
            size = {"batch": BATCH, "seq_len": SEQ, "seed": seed, "vocab_size": VOCAB}
            poison(ROOT / DATA / "text_train", ROOT / target, BAD_STEPS, **size)
        overrides.append(f'megastab.data.train=[[1.0,"{target}"]]')
    return Run(f"{place}/{condition.name}/{slug(method)}-seed{seed}", tuple(overrides))


def loss_outliers(losses: Sequence[float]) -> int:
    """Losses more than six robust deviations above the median of the last good ones, as the policy counts them."""
    judge = LossSpikes(6.0)
    return sum(judge.observe(loss) for loss in losses)


def facts(run: Run) -> dict[str, Any]:
    """The figures of one run."""
    history: History = read_history(run.folder)
    losses, norms = history.column("loss"), history.column("grad_norm")
    return {
        "valid_loss": valid_loss(run),
        "loss_spike_score": spike_score(losses, WINDOW),
        "norm_spike_score": spike_score(norms, WINDOW),
        "loss_outliers": loss_outliers(losses),
        "clipped": len(history.steps_where("clip")),
        "skipped": len(history.steps_where("skip")),
        "median_norm": statistics.median(norms),
        "largest_norm": max(norms),
        "steps": len(losses),
        "cpu_seconds": outcome_of(run)["cpu_seconds"],
        "command": outcome_of(run)["command"],
    }


def fixed(condition: Condition, cap: float, seed: int, steps: int, place: str) -> Run:
    """A cell of the fixed clip."""
    return training_run(condition, f"fixed {cap}", (f"gradient_clipping={cap}",), seed, steps, place)


def best(by_cap: dict[float, Run]) -> float:
    """The cap with the lowest validation loss."""
    return min(by_cap, key=lambda cap: valid_loss(by_cap[cap]))


def compare(conditions: Sequence[Condition], seeds: Sequence[int], steps: int, jobs: int, place: str) -> dict[str, dict[str, list[Run]]]:
    """Run everything, seed after seed; {condition: {method: [run of each seed]}}. The tuned cap is chosen on the first seed."""
    table: dict[str, dict[str, list[Run]]] = {c.name: {} for c in conditions}
    caps: dict[str, float] = {}
    for seed in seeds:
        for c in conditions:
            cells = {m: training_run(c, m, settings, seed, steps, place) for m, settings in METHODS.items()}
            tried = {cap: fixed(c, cap, seed, steps, place) for cap in (1.0, *CAPS)} if c.name not in caps else {}
            run_all([*tried.values(), *cells.values()], jobs)
            cap = caps.setdefault(c.name, best(tried) if tried else 0.0)
            tuned = fixed(c, cap, seed, steps, place)
            run_all([tuned], jobs)
            for method, run in {"fixed 1.0": cells["fixed 1.0"], f"fixed, tuned ({cap:g})": tuned, **cells}.items():
                table[c.name].setdefault(method, []).append(run)
    return table


def row(method: str, runs: Sequence[Run]) -> list[str]:
    """One line of the page's table."""
    each = [facts(run) for run in runs]
    valid = [fact["valid_loss"] for fact in each]
    cells = [f"**{mean(valid):.4f}**", " / ".join(f"{x:.4f}" for x in valid)]
    for key, digits in (("loss_spike_score", 2), ("norm_spike_score", 2), ("loss_outliers", 0), ("clipped", 0), ("skipped", 0)):
        cells.append(" / ".join(f"{fact[key]:.{digits}f}" for fact in each))
    return [method, *cells]


HEADER = ("method", "validation loss", "each seed", "loss spike score, %", "norm spike score, %", "loss outliers", "clipped", "skipped")


def publish(table: dict[str, dict[str, list[Run]]], place: str) -> None:
    """JSON, the page's table and pictures."""
    parts = [f"### {name}\n\n" + markdown(HEADER, [row(m, runs) for m, runs in by.items()]) for name, by in table.items()]
    text = "\n\n".join(parts) + f"\n\n{cpu_minutes(place):.0f} CPU-minutes for these runs, {cpu_minutes('probe'):.0f} for the probes."
    print(text)
    if place != "spikes":
        return
    figures = {name: {m: [facts(run) for run in runs] for m, runs in by.items()} for name, by in table.items()}
    (HERE / "spikes.json").write_text(json.dumps(figures, indent=1) + "\n")
    write_into(HERE / "spikes.md", "table", text)
    valid = {name: {m: [valid_loss(run) for run in runs] for m, runs in by.items()} for name, by in table.items()}
    draw_losses(valid, HERE / "spikes_valid.png")
    shown = ("fixed 1.0", "ZClip hardened")
    draw_curves({name: {m: read_history(by[m][0].folder) for m in shown} for name, by in table.items()}, HERE / "spikes_curves.png")


def probe(steps: int, jobs: int) -> None:
    """Short runs with the fixed clip alone: where do spikes occur?"""
    common = (f"megastab.run.total_steps={steps}", "megastab.run.seed=1")
    runs = {name: Run(f"probe/{slug(name)}", (*more, *common)) for name, more in PROBES.items()}
    run_all(list(runs.values()), jobs)
    rows = []
    for name, run in runs.items():
        fact = facts(run)
        keys = ("loss_spike_score", "norm_spike_score", "median_norm", "largest_norm", "valid_loss")
        rows.append([name, *(f"{fact[key]:.3f}" for key in keys)])
    text = markdown(("probe", "loss spike score, %", "norm spike score, %", "median norm", "largest norm", "validation loss"), rows)
    print(text)
    write_into(HERE / "spikes.md", "probes", text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="ten learning rates and settings, four seeds, five times the tokens")
    size.add_argument("--smoke", action="store_true", help="two steps of everything; the figures mean nothing")
    size.add_argument("--probe", action="store_true", help="only the search for a regime with spikes")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    arguments = parser.parse_args()
    prepare_data()
    if arguments.probe:
        probe(300, arguments.jobs)
    elif arguments.full:
        publish(compare((*CONDITIONS, *LADDER), (1, 2, 3, 4), 2000, arguments.jobs, "spikes-full"), "spikes-full")
    elif arguments.smoke:
        publish(compare(CONDITIONS, (1,), 2, arguments.jobs, "smoke"), "smoke")
    else:
        publish(compare(CONDITIONS, (1, 2), 240, arguments.jobs, "spikes"), "spikes")


if __name__ == "__main__":
    main()
