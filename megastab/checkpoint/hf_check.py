"""Whether an exported model is the model: our logits against those transformers computes from the files just written."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megastab.checkpoint.hf_files import CONFIG, read_json
from megastab.checkpoint.hf_modeling import KIND, load_own
from megastab.checkpoint.init_from import Start, fill
from megastab.config.errors import UserError
from megastab.config.schema import Megastab
from megastab.model.transformer import Transformer

FILE = "logit_check.json"
# Both compute in fp32, with sums in other orders and (in transformers) angles of rotary positions in fp32: some 1e-6 of the largest
# logit at a few layers, growing slowly with depth. A wrong name, turn or constant is off by the logits themselves.
TOLERANCE = 1e-4
SAMPLES, TOKENS, SEED = 2, 64, 0


def check_logits(folder: Path, start: Start) -> dict[str, Any]:
    """Compare on random tokens, one model in memory at a time, on the CPU in fp32.

    Args:
        folder: the export.
        start: what was exported.

    Returns:
        What is written beside the weights; ``result`` says so where transformers is not installed, or older than the architecture.

    Raises:
        UserError: the logits differ by more than ``TOLERANCE`` times the largest of them (at least 1).
    """
    if importlib.util.find_spec("transformers") is None:
        return {"result": "not run: transformers is not installed"}
    import transformers

    kind = read_json(folder / CONFIG)["model_type"]
    if kind != KIND and kind not in transformers.CONFIG_MAPPING:
        return {"result": f"not run: transformers {transformers.__version__} does not know {kind}"}
    tokens = random_tokens(start)
    ours, theirs = _ours(start, tokens), _theirs(folder, kind, tokens)
    difference, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
    limit = TOLERANCE * max(1.0, largest)
    found = {
        "max_abs_difference": difference,
        "max_abs_logit": largest,
        "tolerance": limit,
        "tokens": list(tokens.shape),
        "seed": SEED,
        "dtype": "float32",
        "transformers": transformers.__version__,
    }
    if not difference <= limit:  # NaN compares false
        raise UserError(
            f"the exported model is not the model: its logits differ by {difference:.3g} (the largest is {largest:.3g}, the tolerance "
            f"{limit:.1g}); {folder} is left for a look, nothing was published"
        )
    return {"result": "equal", **found}


def random_tokens(start: Start) -> Tensor:
    """[B, S] token ids, the same each time."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, start.model.vocab_size or 0, (SAMPLES, min(TOKENS, start.model.max_seq_len)), generator=generator)


@torch.no_grad()
def _ours(start: Start, tokens: Tensor) -> Tensor:
    model = Transformer(Megastab(model=start.model)).eval()
    fill(model, start)
    return model.logits(tokens).view(*tokens.shape, -1)[..., : start.model.vocab_size]


@torch.no_grad()
def _theirs(folder: Path, kind: str, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    loaded = load_own(folder) if kind == KIND else AutoModelForCausalLM.from_pretrained(folder)
    model = loaded.float().eval()  # the argument for it has another name in every version
    return model(tokens).logits
