"""Command-line arguments that analyses share, and what they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megastab.analysis.output import Output
from megastab.analysis.subject import Names, Subject, open_subject
from megastab.analysis.windows import text_windows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Analysis(NamedTuple):
    """A subcommand of tools/analyze.py. Every module named in ``command_line.MODULES`` holds one, called ``ANALYSIS``."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    """``--output``."""
    parser.add_argument("--output", metavar="DIR", help="write tables (JSON and Markdown) and pictures there; default: print only")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and where a foreign one keeps its parts."""
    parser.add_argument("model", metavar="MODEL", help="run folder, checkpoint folder, or local Hugging Face directory")
    parser.add_argument("--checkpoint", metavar="TAG", help="of a run folder, e.g. step00000100 (default: the newest)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the weights (default: fp32 on a CPU, what was saved elsewhere)")
    parser.add_argument("--blocks", metavar="NAME", help="where a foreign model keeps its blocks, e.g. transformer.h")
    parser.add_argument("--attention", metavar="NAME", help="what a foreign block calls its attention, e.g. attn")
    parser.add_argument("--mlp", metavar="NAME", help="what a foreign block calls its MLP, e.g. mlp")


def add_text_arguments(parser: argparse.ArgumentParser, num_windows: int = 10, seq_len: int | None = None) -> None:
    """Text, and how much of it. ``seq_len`` None: what the model was built for, at most 4096."""
    parser.add_argument(
        "--text", required=True, metavar="SOURCE", help='text file, folder of them, .jsonl with "text", or .bin/.idx prefix'
    )
    parser.add_argument("--windows", type=int, default=num_windows, metavar="N", help="windows of text (default: %(default)s)")
    default = seq_len or "as the model was built for, at most 4096"
    parser.add_argument("--seq-len", type=int, default=seq_len, metavar="S", help=f"tokens of a window (default: {default})")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="windows of one forward pass (default: %(default)s)")


def add_bos_argument(parser: argparse.ArgumentParser) -> None:
    """With, without, or both."""
    parser.add_argument(
        "--bos", choices=("with", "without", "both"), default="both", help="start windows with the BOS token (default: both, one by one)"
    )


def subject_of(arguments: argparse.Namespace, is_eager: bool = False) -> Subject:
    """The model asked for."""
    names = Names(arguments.blocks, arguments.attention, arguments.mlp)
    dtype = DTYPES[arguments.dtype] if arguments.dtype else None
    return open_subject(arguments.model, dtype, arguments.checkpoint, names, is_eager)


def windows_of(arguments: argparse.Namespace, subject: Subject, bos: bool) -> Tensor:
    """[N, S] as asked."""
    seq_len = arguments.seq_len or min(subject.max_seq_len, 4096)
    return text_windows(subject, arguments.text, arguments.windows, seq_len, bos)


def settings_of(arguments: argparse.Namespace, subject: Subject) -> list[bool]:
    """Whether windows start with BOS, one after another. ``both`` is without alone where the tokenizer has no such token, and says so."""
    if arguments.bos == "both" and subject.bos is None:
        print(f"{subject.name} has no BOS token ({subject.no_codec or 'its tokenizer names none'}): without it only")
        return [False]
    return {"with": [True], "without": [False], "both": [True, False]}[arguments.bos]


def output_of(arguments: argparse.Namespace) -> Output:
    """Where results go."""
    return Output(arguments.output)


def setting_name(bos: bool) -> str:
    """As results call it."""
    return "with BOS" if bos else "without BOS"
