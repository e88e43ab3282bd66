"""Text from a trained model: ``python tools/sample.py --run runs/quickstart --prompt "def " --max-tokens 100 --temperature 0.8``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed


def main() -> None:
    """Command line over ``megastab.engine.inference`` and ``megastab.model.generate``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, metavar="DIR", help="run folder (megastab.run.dir)")
    parser.add_argument("--checkpoint", metavar="TAG", help="e.g. step00000100 (default: the newest)")
    parser.add_argument("--prompt", default="", help="text to continue; empty starts a document")
    parser.add_argument("--max-tokens", type=int, default=100, help="tokens to add at most (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: %(default)s)")
    parser.add_argument("--top-k", type=int, help="draw from the K likeliest tokens only")
    parser.add_argument("--top-p", type=float, help="draw from the fewest tokens whose probability reaches P")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    arguments = parser.parse_args()

    from megastab.config.errors import UserError

    try:
        sample(arguments)
    except UserError as error:
        sys.exit(f"error: {error}")


def sample(arguments: argparse.Namespace) -> None:
    """Load, then print the prompt and what follows as it is made."""
    from megastab.engine.inference import find_checkpoint, load_for_inference, text_of, tokenizer_of
    from megastab.model.generate import Generation

    checkpoint = find_checkpoint(arguments.run, arguments.checkpoint)
    loaded = load_for_inference(checkpoint)
    tokenizer = tokenizer_of(checkpoint, loaded)
    prompt_ids = tokenizer.encode(arguments.prompt) or [tokenizer.eod]
    shape = {"temperature": arguments.temperature, "top_k": arguments.top_k, "top_p": arguments.top_p}
    generation = Generation(loaded.model, prompt_ids, arguments.max_tokens, eod=tokenizer.eod, seed=arguments.seed, **shape)
    print(tokenizer.decode(prompt_ids), end="", flush=True)
    for text in text_of(tokenizer, prompt_ids, generation):
        print(text, end="", flush=True)
    print(f"\n[{checkpoint.name}: {len(generation.ids)} tokens, stopped at {generation.stopped}]", file=sys.stderr)


if __name__ == "__main__":
    main()
