"""Models in and out of Hugging Face's form, and checkpoints in other files: ``convert.py import``, ``export`` and ``reshard``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed


def main() -> None:
    """Command line over ``megastab.checkpoint``."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    come = commands.add_parser("import", help="a Hugging Face directory -> weights to start from, a config to fill in, the tokenizer")
    come.add_argument("folder", metavar="HF_DIR", help="config.json and safetensors, whole or in shards")
    come.add_argument("--max-seq-len", type=int, metavar="N", help="a shorter context than the model's (rotary models)")
    go = commands.add_parser("export", help="a checkpoint of any layout -> safetensors, config.json, tokenizer, logit_check.json")
    go.add_argument("folder", metavar="RUN_OR_CHECKPOINT", help="run folder (its newest checkpoint), or one checkpoint")
    go.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a weights file (default: %(default)s)")
    go.add_argument("--tokenizer", type=Path, metavar="PATH", help=".model file, or folder of tokenizer files (default: the run's)")
    go.add_argument("--modeling-file", action="store_true", help="with code of its own where Hugging Face has no architecture for it")
    again = commands.add_parser("reshard", help="a checkpoint of any layout -> the same in N files (a run resumes at any layout as it is)")
    again.add_argument("folder", metavar="RUN_OR_CHECKPOINT", help="run folder (its newest checkpoint), or one checkpoint")
    again.add_argument("--files", type=int, default=1, metavar="N", help="of states, and as many of weights (default: %(default)s)")
    for command in (come, go, again):
        command.add_argument("out", metavar="OUT", help="folder to make; it must not exist")
    arguments = parser.parse_args()

    from megastab.config.errors import UserError

    try:
        {"import": bring, "export": send, "reshard": rewrite}[arguments.command](arguments)
    except UserError as error:
        sys.exit(f"error: {error}")


def bring(arguments: argparse.Namespace) -> None:
    """From Hugging Face."""
    from megastab.checkpoint.hf_import import FILL_IN, import_model

    made = import_model(arguments.folder, arguments.out, arguments.max_seq_len)
    print(f"{made.folder}: weights, tokenizer and config.json; give it your data where it says {FILL_IN}")
    print("".join(f"  note: {note}\n" for note in made.notes), end="")


def send(arguments: argparse.Namespace) -> None:
    """To Hugging Face."""
    from megastab.checkpoint.hf_export import bytes_of, export_model

    checkpoint, size = checkpoint_of(arguments.folder), bytes_of(arguments.max_shard_size)
    made = export_model(checkpoint, arguments.out, size, arguments.tokenizer, arguments.modeling_file)
    print(f"{made.folder}: {made.kind}, from {checkpoint}; {made.said}")
    print("".join(f"  note: {note}\n" for note in made.notes), end="")


def rewrite(arguments: argparse.Namespace) -> None:
    """Into other files."""
    from megastab.checkpoint import reshard

    made = reshard.rewrite(checkpoint_of(arguments.folder), Path(arguments.out), arguments.files)
    print(f"{made}: go on from it at any layout with megastab.run.resume={made.parent}")


def checkpoint_of(folder: str) -> Path:
    """A run's newest checkpoint, or the one that is named."""
    from megastab.engine.inference import find_checkpoint

    return find_checkpoint(folder) if (Path(folder) / "checkpoints").is_dir() else Path(folder)


if __name__ == "__main__":
    main()
