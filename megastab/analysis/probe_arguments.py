"""Command-line arguments the probes of perplexity and accuracy share beside those of ``arguments.py``."""

from __future__ import annotations

import argparse
from typing import NamedTuple

from torch import Tensor

from megastab.analysis import arguments as shared
from megastab.analysis.subject import Subject
from megastab.analysis.windows import text_windows
from megastab.config.errors import UserError


class Windows(NamedTuple):
    """Two sets of windows that share none."""

    evaluated_NS: Tensor
    calibration_CS: Tensor


def add_start_argument(parser: argparse.ArgumentParser) -> None:
    """``--bos``: one setting, since a probe is dozens of passes."""
    parser.add_argument("--bos", choices=("with", "without"), help="start sequences with the BOS token (default: with, where there is one)")


def add_calibration_argument(parser: argparse.ArgumentParser, purpose: str, windows: int = 4) -> None:
    """``--calibration``."""
    parser.add_argument(
        "--calibration", type=int, default=windows, metavar="C", help=f"further windows, on which {purpose} (default: %(default)s)"
    )


def starts_with_bos(arguments: argparse.Namespace, subject: Subject) -> bool:
    """Whether sequences start with BOS."""
    if arguments.bos == "with" and subject.bos is None:
        raise UserError(f"--bos with, but {subject.name} has no BOS token: leave it out")
    return subject.bos is not None and arguments.bos != "without"


def evaluated_and_calibration(arguments: argparse.Namespace, subject: Subject) -> Windows:
    """The first ``--windows`` of the text, and the next ``--calibration``."""
    if min(arguments.windows, arguments.calibration, arguments.batch) < 1:
        asked = f"--windows {arguments.windows}, --calibration {arguments.calibration} and --batch {arguments.batch}"
        raise UserError(f"{asked} must be at least 1")
    seq_len = arguments.seq_len or min(subject.max_seq_len, 4096)
    count = arguments.windows + arguments.calibration
    found_NS = text_windows(subject, arguments.text, count, seq_len, starts_with_bos(arguments, subject))
    return Windows(found_NS[: arguments.windows], found_NS[arguments.windows :])


def how_evaluated(arguments: argparse.Namespace, subject: Subject, windows: Windows) -> dict[str, object]:
    """What a result's JSON says of its making."""
    return {
        "model": subject.name,
        "text": arguments.text,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "bos": starts_with_bos(arguments, subject),
        "windows": len(windows.evaluated_NS),
        "calibration_windows": len(windows.calibration_CS),
        "seq_len": windows.evaluated_NS.shape[1],
        "batch": arguments.batch,
    }


def add_common_arguments(parser: argparse.ArgumentParser, calibrated: str) -> None:
    """Model, text, BOS, calibration and output."""
    shared.add_model_arguments(parser)
    shared.add_text_arguments(parser)
    add_start_argument(parser)
    add_calibration_argument(parser, calibrated)
    shared.add_output_argument(parser)
