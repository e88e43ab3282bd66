"""Train a SentencePiece tokenizer: ``[mpirun -n 4] python tools/train_tokenizer.py --output data/tok --vocab-size 8192 corpus.jsonl``."""

from __future__ import annotations

import argparse


def main() -> None:
    """Command line over ``megastab.data.tokenizer_training``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", nargs="+", help=".txt (a file is a document) or .jsonl (a line is one), also as .gz or .zst; .parquet")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.model")
    parser.add_argument("--vocab-size", type=int, required=True, help="number of pieces")
    parser.add_argument("--kind", choices=("bpe", "unigram"), default="bpe", help="(default: %(default)s)")
    parser.add_argument("--key", "--text-key", default="text", help="key of the text in .jsonl, column in .parquet (default: %(default)s)")
    parser.add_argument(
        "--max-bytes", type=int, default=20_000_000, help="text to learn from, spread over the input (default: %(default)s)"
    )
    parser.add_argument("--character-coverage", type=float, default=0.9995, help="rarer characters become bytes (default: %(default)s)")
    arguments = parser.parse_args()

    from megastab.data.tokenizer_training import train_tokenizer
    from megastab.data.world import joined

    with joined() as world:
        tokenizer = train_tokenizer(
            arguments.inputs,
            arguments.output,
            arguments.vocab_size,
            arguments.kind,
            key=arguments.key,
            max_bytes=arguments.max_bytes,
            character_coverage=arguments.character_coverage,
            world=world,
        )
    if world.rank == 0:
        print(f"{tokenizer.path}: {tokenizer.vocab_size} pieces, end of document {tokenizer.eod}, sha256 {tokenizer.fingerprint[:12]}")


if __name__ == "__main__":
    main()
