"""Examine a trained model: ``python tools/analyze.py existence MODEL --text FILE``.

MODEL is a run folder, a checkpoint folder, or a local Hugging Face directory (GPT-2, LLaMA, Qwen, Gemma, OLMo, Mistral); nothing is
downloaded. ``python tools/analyze.py ANALYSIS --help`` tells what each analysis takes; docs/analysis.md what to make of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed


def main() -> None:
    """Command line over ``megastab.analysis``."""
    from megastab.analysis.command_line import parser_of
    from megastab.config.errors import UserError

    arguments = parser_of(__doc__).parse_args()
    try:
        arguments.run(arguments)
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # a full disk, a folder that may not be written
        sys.exit(f"error: {error.filename}: {error.strerror}; --output writes elsewhere")


if __name__ == "__main__":
    main()
