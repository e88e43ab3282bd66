"""What a run would be and hold: ``python tools/plan.py configs/llama_7b.json --world-size 64 megastab.parallel.tensor=8``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).resolve().parent)]  # this file is no module called plan
sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed


def main() -> None:
    """Command line over ``megastab.plan.plan``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="the one JSON of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. zero_optimization.stage=3")
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks to plan for (default: WORLD_SIZE, else 1)")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    arguments = parser.parse_intermixed_args()

    from megastab.config.errors import UserError
    from megastab.config.load import load_config
    from megastab.plan.plan import plan
    from megastab.plan.text import render

    try:
        made = plan(load_config(arguments.config, arguments.overrides, arguments.world_size))
    except UserError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(made.to_json(), indent=2) if arguments.json else render(made))


if __name__ == "__main__":
    main()
