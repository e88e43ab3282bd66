"""What a run would be and hold: ``python tools/plan.py configs/llama_7b.json --world-size 64 megastab.parallel.tensor=8``; with
``--cluster h100 --nodes 16`` also what it would send and how long a step would take, and with ``--search`` the best layouts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).resolve().parent)]  # this file is no module called plan
sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed


def main() -> None:
    """Command line over ``megastab.plan.command``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="the one JSON of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. zero_optimization.stage=3")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")

    from megastab.config.errors import UserError
    from megastab.plan.command import add_arguments, report

    add_arguments(parser)
    arguments = parser.parse_intermixed_args()
    try:
        print(report(arguments.config, arguments.overrides, arguments, arguments.json))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
