"""The subcommands of ``tools/analyze.py``: one line in ``MODULES`` adds one."""

from __future__ import annotations

import argparse
from importlib import import_module

from megastab.analysis.arguments import Analysis

MODULES: tuple[str, ...] = (
    "existence",
    "top",
    "kurtosis",
    "first_token",
    "attention",
    "intervene",
    "quantize",
    "choice",
    "sparsity",
    "dynamics",
    "predict",
)
"""Modules of this room that hold an ``ANALYSIS``, in the order of the help."""


def analyses() -> list[Analysis]:
    """All of them."""
    return [import_module(f"megastab.analysis.{name}").ANALYSIS for name in MODULES]


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser whose result holds ``run``."""
    parser = argparse.ArgumentParser(description=description)
    commands = parser.add_subparsers(title="analyses", required=True, metavar="ANALYSIS")
    for analysis in analyses():
        said = analysis.help.replace("%", "%%")  # argparse formats it
        command = commands.add_parser(analysis.name, help=said, description=said)
        analysis.add_arguments(command)
        command.set_defaults(run=analysis.run)
    return parser
