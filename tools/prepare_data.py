"""Text files to a Megatron dataset: ``python tools/prepare_data.py --tokenizer tok.model --output data/c4 --workers 8 *.jsonl.gz``."""

from __future__ import annotations

import argparse
import os
import sys


def main() -> None:
    """Command line over ``megastab.data.prepare``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", nargs="+", help=".txt (a file is a document) or .jsonl (a line is one), also as .gz")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx and .json")
    parser.add_argument("--tokenizer", required=True, metavar="MODEL", help="SentencePiece .model file")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; changes no output (default: %(default)s)")
    parser.add_argument(
        "--valid-fraction", type=float, default=0.0, help="share of documents sent to PREFIX_valid, the rest to PREFIX_train"
    )
    parser.add_argument("--key", default="text", help="key of the text in .jsonl lines (default: %(default)s)")
    parser.add_argument("--no-eod", action="store_true", help="do not end documents with an end-of-document token")
    arguments = parser.parse_args()

    from megastab.config.errors import UserError
    from megastab.data.prepare import prepare

    try:
        written = prepare(
            arguments.inputs,
            arguments.output,
            arguments.tokenizer,
            arguments.workers,
            arguments.valid_fraction,
            arguments.key,
            not arguments.no_eod,
        )
    except UserError as error:
        sys.exit(f"error: {error}")
    for prefix, facts in written.items():
        bits = f"unigram {facts.unigram_bits_per_byte:.3f} bits per byte"
        print(f"{prefix}: {facts.documents} documents, {facts.tokens} tokens, {facts.text_bytes / 1e6:.1f} MB of text, {bits}")


if __name__ == "__main__":
    main()
