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
    from megastab.engine.convert import bring, reshard, send

    of = vars(arguments)
    try:
        if of["command"] == "import":
            print(bring(of["folder"], of["out"], of["max_seq_len"]))
        elif of["command"] == "export":
            print(send(of["folder"], of["out"], of["max_shard_size"], of["tokenizer"], of["modeling_file"]))
        else:
            print(reshard(of["folder"], of["out"], of["files"]))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
