"""Text to a Megatron dataset: ``[mpirun -n 16] python tools/prepare_data.py --tokenizer tok.model --output data/c4 *.jsonl.zst``."""

from __future__ import annotations

import argparse


def main() -> None:
    """Command line over ``megastab.data.prepare``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", nargs="+", help=".txt (a file is a document) or .jsonl (a line is one), also as .gz or .zst; .parquet")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx and .json")
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="SentencePiece .model or Hugging Face tokenizer.json")
    parser.add_argument("--workers", type=int, help="processes of each rank; changes no output (default: this rank's share of the cores)")
    parser.add_argument(
        "--valid-fraction", type=float, default=0.0, help="share of documents sent to PREFIX_valid, the rest to PREFIX_train"
    )
    parser.add_argument("--key", "--text-key", default="text", help="key of the text in .jsonl, column in .parquet (default: %(default)s)")
    parser.add_argument("--no-eod", action="store_true", help="do not end documents with an end-of-document token")
    arguments = parser.parse_args()

    from megastab.data.prepare import prepare
    from megastab.data.world import default_workers, joined

    with joined() as world:
        written = prepare(
            arguments.inputs,
            arguments.output,
            arguments.tokenizer,
            default_workers() if arguments.workers is None else arguments.workers,
            arguments.valid_fraction,
            arguments.key,
            not arguments.no_eod,
            world=world,
        )
    for prefix, facts in written.items():
        bits = f"unigram {facts.unigram_bits_per_byte:.3f} bits per byte"
        print(f"{prefix}: {facts.documents} documents, {facts.tokens} tokens, {facts.text_bytes / 1e6:.1f} MB of text, {bits}")


if __name__ == "__main__":
    main()
