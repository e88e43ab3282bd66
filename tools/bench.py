"""Every figure the project promises, measured here: ``python tools/bench.py [NAME ...] [--quick] [--json FILE]``. See docs/bench.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

NAMES = {
    "single": "our step's speed over a bare PyTorch loop's",
    "memory": "our peak memory over a bare PyTorch loop's",
    "trainer": "over Hugging Face's Trainer (pip install -e '.[bench]')",
    "tp2": "two tensor-parallel ranks over one process",
    "start": "import, help, dry run, launch to the first step",
    "data": "preparing data; fetching it in a step",
    "wrappers": "ZeRO 1, 2 and 3 over a bare loop",
    "stability": "what ZClip and TVR themselves cost",
    "orthoadam": "OrthoAdam's step over AdamW's, by the built op and in pure torch",
    "ortho_step": "the whole training step with OrthoAdam over the same with AdamW",
    "attention": "attention's sinks and soft-cap over plain causal SDPA",
    "norms": "dynamic tanh over RMSNorm, eager and compiled",
    "offload": "activations on a disk or in host memory over activations in place: memory and time",
    "recompute": "activation checkpointing: each policy's memory and time over keeping everything, and the planner's of both",
}


def main() -> None:
    """Command line over ``megastab.report.bench``; a missed bound is a word in the table, never a failure."""
    described = "\n".join(f"  {name:11}{text}" for name, text in NAMES.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"figures:\n{described}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="figures to take (default: all)")
    parser.add_argument("--threads", type=int, default=2, help="threads of a process; ranks share them (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="check that the bench works: model A, few rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the raw numbers")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in NAMES]:
        parser.error(f"no figure {', '.join(unknown)}; there are {', '.join(NAMES)}")

    from megastab.report.bench.cases import Options
    from megastab.report.bench.run import run

    run(arguments.names or list(NAMES), Options(arguments.threads, arguments.quick), arguments.json)


if __name__ == "__main__":
    main()
