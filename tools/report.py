"""A picture of a run: ``python tools/report.py runs/quickstart`` draws loss, gradient norm and learning rate."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed


def main() -> None:
    """Command line over ``megastab.report.curves``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run folder (megastab.run.dir)")
    parser.add_argument("--output", metavar="PNG", help="where to (default: curves.png in the run folder)")
    arguments = parser.parse_args()

    from megastab.config.errors import UserError
    from megastab.report.curves import draw_curves
    from megastab.report.history import read_history

    try:
        path = draw_curves(arguments.run, arguments.output)
        print(f"{path}\n{read_history(arguments.run).summary()}")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
