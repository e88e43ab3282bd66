"""One view on a trained model, wherever it comes from: a run or checkpoint folder of ours, or a local Hugging Face directory.

``open_subject`` tells which it is. What every analysis needs is here: the blocks, their attention and MLP, the matrices in them, a
forward pass, text to tokens and back, and :meth:`Subject.watch`, which shows a function what modules give as [B, S, D], whatever the
model's own form is (flat tokens, a tensor, a tuple).

Differs: the released code of arXiv 2503.22329 takes ``output[0]`` of a block's output. Newer transformers return a tensor there, of
which that is sample 0. A tuple is opened here and a tensor is not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megastab.checkpoint.manifest import FILE as MANIFEST
from megastab.config.errors import UserError

See = Callable[[int, Tensor], Tensor | None]
"""(layer, [B, S, D]) -> what to put there instead, or None."""


class Names(NamedTuple):
    """Where a foreign model keeps its parts; what is None is found by structure."""

    blocks: str | None = None
    """Dotted name of the list of blocks, e.g. ``transformer.h``."""
    attention: str | None = None
    """Name of the attention inside a block, e.g. ``attn``."""
    mlp: str | None = None


class Codec(NamedTuple):
    """Text to token ids and back. ``encode`` adds nothing before or behind."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    bos: int | None
    """The token a document starts with; None where the tokenizer has none. Ours is the end of the document before."""


class Linear(NamedTuple):
    """A matrix in a block."""

    name: str
    module: nn.Module
    layer: int
    role: str
    """``q``, ``o``, ``gate+up``, ... as in ``param_info.Role``, fused ones joined; the module's own name where nobody knows it."""
    weight: nn.Parameter
    is_transposed: bool
    """True where y = x @ W, so that W is [in, out] (GPT-2's Conv1D, our o and down); else y = x @ W.T and W is [out, in]."""
    parts: tuple[int, ...]
    """Sizes of the fused logical matrices along the output axis."""


@dataclass
class Subject:
    """A trained model in evaluation mode on the accelerator."""

    name: str
    model: nn.Module
    blocks: list[nn.Module]
    heads: int
    hidden_size: int
    max_seq_len: int
    vocab_size: int
    forward: Callable[[Tensor], Tensor]
    """[B, S] ids -> [B, S, V]."""
    stream: Callable[[Tensor], Any]
    """[B, S] ids through all blocks; the head is left out where the model allows it."""
    find: Callable[[str], list[nn.Module]]
    """``attention`` or ``mlp`` -> that module of every block, or an error that says what there is."""
    find_linears: Callable[[], Iterator[Linear]]
    maps_of: Callable[[nn.Module, Any, Any], Tensor]
    """(attention, its positional inputs, its output) -> the weights on its keys, [B, Q, S, S]."""
    codec: Codec | None = None
    no_codec: str = "it has no tokenizer"
    """Why there is no ``codec``."""
    tokenizer: Any = None
    """The object behind ``codec``."""
    is_ours: bool = False
    has_sink: bool = False
    """Whether attention has a sink that is no key (softmax-1, a learned logit, a key-value bias)."""
    _shape: tuple[int, int] = field(default=(0, 0), repr=False)

    @cached_property
    def attentions(self) -> list[nn.Module]:
        """The attention of every block; its output is what it adds to the residual stream (before an output norm)."""
        return self.find("attention")

    @cached_property
    def mlps(self) -> list[nn.Module]:
        """The MLP of every block."""
        return self.find("mlp")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.model.parameters()).dtype

    def linears(self) -> Iterator[Linear]:
        """The matrices of all blocks in order; embeddings and head are not among them."""
        return self.find_linears()

    # -- text ----------------------------------------------------------------------------------------------------------

    @property
    def bos(self) -> int | None:
        """The token a document starts with."""
        return self.codec.bos if self.codec else None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without a BOS token."""
        if self.codec is None:
            raise UserError(f"{self.name}: {self.no_codec}. Or give token ids: the prefix of a .bin/.idx dataset of its own tokenizer")
        return self.codec.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; their numbers where there is no tokenizer."""
        return self.codec.decode([int(i) for i in ids]) if self.codec else " ".join(f"<{int(i)}>" for i in ids)

    def token_text(self, token: int) -> str:
        """One token as a reader can tell it: quoted text, ``BOS``, or its number where it has no text of its own."""
        if self.codec is None or token >= self.vocab_size:
            return f"<{token}>"
        text = self.codec.decode([token])
        name = repr(text) if text and "\ufffd" not in text else f"<{token}>"
        return f"BOS {name}" if token == self.bos else name

    # -- forward passes ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, tokens_BS: Tensor) -> Tensor:
        """[B, S] ids -> [B, S, V] in the weights' dtype."""
        return self.forward(self._placed(tokens_BS))

    @torch.no_grad()
    def run(self, tokens_BS: Tensor) -> None:
        """Send tokens through all blocks, for those who watch."""
        self.stream(self._placed(tokens_BS))

    def _placed(self, tokens_BS: Tensor) -> Tensor:
        if tokens_BS.shape[1] > self.max_seq_len:
            raise UserError(f"{self.name}: windows of {tokens_BS.shape[1]} tokens, but {self.max_seq_len} positions; lower --seq-len")
        self._shape = (tokens_BS.shape[0], tokens_BS.shape[1])
        return tokens_BS.to(self.device)

    @contextmanager
    def watch(self, modules: Sequence[nn.Module], see: See) -> Iterator[None]:
        """Call ``see`` with what each of ``modules`` gives in the passes made inside, as [B, S, D], in the model's dtype.

        ``see(i, hidden_BSD)`` gets the index of the module among ``modules``. What it returns, if not None, takes the output's place.
        """
        handles: list[Any] = []
        try:
            handles += [module.register_forward_hook(partial(self._seen, see, i)) for i, module in enumerate(modules)]
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def watch_maps(self, see: Callable[[int, Tensor], None]) -> Iterator[None]:
        """Call ``see(layer, maps_BQSS)`` with the attention weights of each layer in the passes made inside, in fp32.

        Rows are queries; where there is a sink that is no key, what a row lacks of 1 is on it. A foreign model must be opened eager.
        """

        def show(layer: int, module: nn.Module, inputs: Any, output: Any) -> None:
            see(layer, self.maps_of(module, inputs, output).float())

        handles: list[Any] = []
        try:
            handles += [module.register_forward_hook(partial(show, i)) for i, module in enumerate(self.attentions)]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _seen(self, see: See, index: int, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = residual_of(output)
        batch, seq = self._shape
        new = see(index, hidden.view(batch, seq, -1))
        if new is None:
            return None
        new = new.to(hidden.dtype).reshape(hidden.shape)
        return (new, *output[1:]) if isinstance(output, tuple) else new


def residual_of(output: Any) -> Tensor:
    """The hidden states in what a block or an attention returns: the tensor itself, or the first of a tuple."""
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor):
        raise UserError(f"a block returned {type(output).__name__}, not a tensor or a tuple that starts with one; map it with --blocks")
    return hidden


def open_subject(
    path: str | Path,
    dtype: torch.dtype | None = None,
    checkpoint: str | None = None,
    names: Names | None = None,
    is_eager: bool = False,
) -> Subject:
    """A trained model from a folder.

    Args:
        path: a run folder or a checkpoint folder of ours, or a Hugging Face directory (``config.json`` and weights). Nothing is fetched.
        dtype: of the weights; ``None`` is fp32 on a CPU and what was saved elsewhere.
        checkpoint: tag within a run folder, e.g. ``step00000100``; the newest if None.
        names: where a foreign model keeps its parts, where structure does not tell.
        is_eager: have foreign attention hand out its maps, [B, Q, S, S] a layer.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"no folder {path}: give a run, a checkpoint or a local Hugging Face directory (nothing is downloaded)")
    kind = _kind_of(path)
    if kind == "foreign":
        if checkpoint is not None:
            raise UserError(f"--checkpoint {checkpoint} is for run folders; {path} is a Hugging Face directory: leave it out")
        from megastab.analysis.hugging_face import open_foreign

        return open_foreign(path, dtype, names or Names(), is_eager)
    from megastab.analysis.own_model import open_own
    from megastab.engine.inference import find_checkpoint

    if kind == "checkpoint" and checkpoint is not None:
        raise UserError(f"--checkpoint {checkpoint}, but {path} is one checkpoint already: give its run folder, or leave the option out")
    return open_own(find_checkpoint(path, checkpoint) if kind == "run" else path, dtype)


def _kind_of(path: Path) -> str:
    if (path / MANIFEST).is_file():
        return "checkpoint"
    config = path / "config.json"
    try:
        keys = json.loads(config.read_text())
    except FileNotFoundError:
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise UserError(f"{path} is no run, checkpoint or Hugging Face directory: no config.json and no {MANIFEST}, but {found}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{config} cannot be read ({error}): copy the folder again") from None
    if isinstance(keys, dict) and ("megastab" in keys or "model_type" in keys):
        return "run" if "megastab" in keys else "foreign"
    raise UserError(f"{config} is neither a run's (no key megastab) nor a Hugging Face model's (no key model_type)")
