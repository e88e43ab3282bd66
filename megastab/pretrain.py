"""The launcher's entry: ``deepspeed --num_gpus N megastab/pretrain.py --deepspeed_config FILE [section.key=value ...]``."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # a launcher puts this file's folder first on the path, where our rooms would shadow installed packages
    _here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != _here]
    if os.path.dirname(_here) not in sys.path:
        sys.path.append(os.path.dirname(_here))

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from megastab.config.errors import UserError
from megastab.config.load import load_config
from megastab.config.ranks import is_first
from megastab.plan.command import add_arguments, report

if TYPE_CHECKING:
    from megastab.config.config import Config


class Parser(argparse.ArgumentParser):
    """Every rank reads the same command line; one of them says what is wrong with it."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if is_first():
            super()._print_message(message, file)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line: a config, overrides of it, and what launchers add."""
    parser = Parser(prog="pretrain.py", description="Pre-train GPT or LLaMA from one JSON.")
    parser.add_argument("--deepspeed_config", required=True, metavar="FILE", help="the one JSON: DeepSpeed's keys and a megastab block")
    parser.add_argument("--dry-run", action="store_true", help="print what the run would be and cost, and exit")
    add_arguments(parser, when=" (with --dry-run)")
    parser.add_argument("--resume", metavar="auto|none|PATH", help="short for megastab.run.resume=...")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher's own
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="e.g. megastab.run.total_steps=20 zero_optimization.stage=3"
    )
    args = parser.parse_intermixed_args(argv)
    if args.resume is not None:
        args.overrides = [*args.overrides, f"megastab.run.resume={args.resume}"]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, train; the exit code."""
    args = arguments(argv)
    try:
        if args.dry_run:
            page = report(args.deepspeed_config, args.overrides, args)
            if is_first():
                print(page)
            return 0
        if args.cluster is not None or args.search or args.nodes is not None:
            raise UserError("--cluster, --nodes and --search plan a run and start none: add --dry-run.")
        config = load_config(args.deepspeed_config, args.overrides)
    except UserError as error:
        if is_first():  # every rank reads the same file and finds the same fault
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    from megastab.engine.launch import run_job

    return run_job(lambda: train(config))


def train(config: Config) -> int:
    """Build the run on this rank and train it to its last step; the exit code, which tells whether it was stopped before."""
    from megastab.data.training import open_training_data
    from megastab.engine.launch import DONE, STOPPED
    from megastab.engine.preflight import check_hosts
    from megastab.engine.trainer import Trainer
    from megastab.parallel import collectives
    from megastab.parallel.grid import Grid

    check_hosts(config)
    with collectives.together("opening the data"):
        config, sources = open_training_data(config)
    parallel = config.megastab.parallel
    grid = Grid.create(parallel.tensor, parallel.pipeline, parallel.sequence, config.megastab.model.num_kv_heads, parallel.context)
    trainer = Trainer(config, grid, sources.cut(config, grid.samples, grid.cp))
    with trainer.guarded():
        trainer.announce()
        trainer.resume()
        return DONE if trainer.train() else STOPPED


def leave(code: int) -> NoReturn:
    """End this process. Not through the interpreter's own shutdown: it aborts now and then over threads that are inside a library just then
    ("terminate called without an active exception"), when all is done and written, and the launcher would call the run failed."""
    if (mpi := sys.modules.get("mpi4py.MPI")) is not None:
        mpi.Finalize()  # mpirun takes a rank that leaves without it for a dead one
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
