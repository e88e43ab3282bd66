"""Every scalar's name, unit and meaning, in one place; ``python -m megastab.telemetry.tags > docs/telemetry.md`` makes the page."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tag:
    """One scalar in TensorBoard."""

    name: str
    unit: str
    meaning: str
    bad: str
    """What a bad value looks like and what to do."""


TAGS: dict[str, Tag] = {
    "loss": Tag(
        "train/loss",
        "nats/token",
        "mean loss over the step's targets on all ranks",
        "a jump: look at events.jsonl and the norm of that step",
    ),
    "grad_norm": Tag(
        "train/grad_norm",
        "-",
        "global L2 norm of the gradient before clipping, the same at every layout",
        "a slow rise over hours: lower the learning rate; inf: the step was skipped",
    ),
    "clip_scale": Tag(
        "train/clip_scale", "-", "factor applied to the gradient by clipping", "below 1 on most steps: the cap is too low to be a cap"
    ),
    "clip_threshold": Tag(
        "train/clip_threshold",
        "-",
        "norm above which the step's gradient is clipped: the fixed cap, or ZClip's mean plus z_thresh deviations",
        "far above the norm for hundreds of steps: ZClip's warm-up saw a few huge norms",
    ),
    "z": Tag(
        "train/z",
        "-",
        "standard score of the norm against its recent history (ZClip)",
        "above z_thresh: a spike, clipped; the samples of the step are in events.jsonl",
    ),
    "rescaled": Tag(
        "train/rescaled",
        "matrices",
        "matrices TVR shrank to their target after the step",
        "all of them at every look: the target is below what the learning rate sustains",
    ),
    "lr": Tag("train/lr", "-", "learning rate of the step", "not what the schedule should say: skipped steps do not advance it"),
    "tokens_per_second": Tag(
        "speed/tokens_per_second",
        "tokens/s",
        "tokens of the step over its wall-clock time, all ranks",
        "a fall: a slow rank, or data loading",
    ),
    "model_tflops": Tag(
        "speed/model_tflops_per_rank",
        "TFLOP/s",
        "FLOPs the model needs (no recompute counted) per second and rank",
        "far below the hardware's: micro-batch too small",
    ),
    "mfu": Tag(
        "speed/mfu", "share", "model FLOP/s over the device's dense peak, where it is known", "below 0.3 on a GPU: look at the layout"
    ),
    "data_seconds": Tag("speed/data_seconds", "s", "time spent fetching the step's samples", "above 1 % of the step: storage is slow"),
    "memory_gb": Tag(
        "memory/peak_gb",
        "GB",
        "peak memory of this process (device memory on an accelerator, resident set on CPU)",
        "near the device's size",
    ),
    "valid_loss": Tag("valid/loss", "nats/token", "mean loss over the validation samples", "rises while train/loss falls: too many epochs"),
    "valid_bits_per_byte": Tag("valid/bits_per_byte", "bits", "validation loss per byte of raw text: comparable over tokenizers", "-"),
}


def to_markdown() -> str:
    """The table as a page."""
    lines = [
        "# What a run tells",
        "",
        "Generated from `megastab/telemetry/tags.py`; the x axis is the step.",
        "",
        "| tag | unit | meaning | a bad value |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{tag.name}` | {tag.unit} | {tag.meaning} | {tag.bad} |" for tag in TAGS.values()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(to_markdown(), end="")
