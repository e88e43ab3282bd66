"""A run in one picture and one page: ``python tools/report.py runs/quickstart`` writes ``curves.png`` and ``report.html`` beside its logs.

The page holds everything (picture included) and needs no network: what ran, the curves with the spikes marked, and for each spike its
norm, z, threshold, what was done, the parameters that carried it, and what the loss did.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed


def main() -> None:
    """Command line over ``megastab.report.curves`` and ``megastab.report.page``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run folder (megastab.run.dir)")
    parser.add_argument("--output", metavar="PNG", help="where the picture goes (default: curves.png in the run folder)")
    parser.add_argument("--page", metavar="HTML", help="where the page goes (default: report.html in the run folder)")
    parser.add_argument("--what-if", metavar="JSON", help="only tell what another rule would have done, e.g. '{\"zclip\": {}}'")
    arguments = parser.parse_args()

    from megastab.config.errors import UserError
    from megastab.report.curves import draw_curves
    from megastab.report.history import read_history
    from megastab.report.page import write_page
    from megastab.report.what_if import answer, question

    try:
        if arguments.what_if:
            print(answer(read_history(arguments.run), question(arguments.what_if)))
            return
        picture = draw_curves(arguments.run, arguments.output)
        print(picture)
        print(write_page(arguments.run, arguments.page, picture))
        print(read_history(arguments.run).summary())
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # a full disk, a folder that may not be written
        sys.exit(f"error: {error.filename}: {error.strerror}; --output and --page write elsewhere")


if __name__ == "__main__":
    main()
