"""Sampling from a model on one rank, with a key/value cache: a forward over the prompt, then one token at a time.

Temperature first, then top-k, then top-p (nucleus, arXiv 1904.09751), each on what the one before left. Randomness is drawn on the
CPU from its own generator, so that a seed gives the same tokens on every device, up to the rounding of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from megastab.config.errors import UserError
from megastab.model.context import Context
from megastab.model.embedding import gathered_logits
from megastab.model.kv_cache import KVCache
from megastab.model.transformer import Transformer

Stopped = Literal["eod", "max_new_tokens", "max_seq_len"]


def probabilities(logits_V: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """The distribution a token is drawn from; one-hot at temperature 0."""
    logits_V = logits_V.float()
    if temperature == 0.0:
        return torch.zeros_like(logits_V).scatter_(0, logits_V.argmax(keepdim=True), 1.0)
    p_V = torch.softmax(logits_V / temperature, dim=-1)
    if top_k is not None and top_k < len(p_V):
        kept = p_V.topk(top_k).indices  # exactly k, also where several tie
        p_V = torch.zeros_like(p_V).scatter_(0, kept, p_V[kept])
    if top_p is not None and top_p < 1.0:
        p_V = _nucleus(p_V / p_V.sum(), top_p)
    return p_V / p_V.sum()


def _nucleus(p_V: Tensor, top_p: float) -> Tensor:
    """Zero all but the fewest tokens whose mass reaches ``top_p``: a token stays while those before it fall short."""
    sorted_V, order_V = p_V.sort(descending=True, stable=True)
    before_V = sorted_V.cumsum(0) - sorted_V
    return torch.zeros_like(p_V).scatter_(0, order_V, sorted_V.where(before_V < top_p, 0.0))


class Generation(Iterator[int]):
    """New token ids as they are made; ``stopped`` says why there are no more."""

    def __init__(
        self,
        model: Transformer,
        prompt_ids: list[int],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eod: int | None = None,
        seed: int = 0,
    ):
        _check(model, prompt_ids, max_new_tokens, temperature, top_k, top_p)
        self.model, self.eod, self.prompt_ids = model, eod, list(prompt_ids)
        self.shape = (temperature, top_k, top_p)
        self.ids: list[int] = []
        """What has been generated, without the end-of-document token."""
        self.stopped: Stopped | None = None
        limit = model.config.max_seq_len
        self.room = min(max_new_tokens, limit - len(prompt_ids))
        self._when_full: Stopped = "max_new_tokens" if self.room == max_new_tokens else "max_seq_len"
        self._caches = [KVCache(len(prompt_ids) + self.room) for _ in model.blocks]
        self._generator = torch.Generator().manual_seed(seed)

    def __next__(self) -> int:
        if self.stopped is None and len(self.ids) == self.room:
            self.stopped = self._when_full
        if self.stopped is not None:
            raise StopIteration
        logits_V = self._next_logits(self.ids[-1:] or self.prompt_ids)
        token = int(torch.multinomial(probabilities(logits_V, *self.shape), 1, generator=self._generator))
        if token == self.eod:
            self.stopped = "eod"
            raise StopIteration
        self.ids.append(token)
        return token

    @torch.inference_mode()
    def _next_logits(self, ids: list[int]) -> Tensor:
        """[V] logits after ``ids``, which follow what the caches hold."""
        tokens = torch.tensor([ids], device=self.model.embedding.weight.device)
        context = Context(1, len(ids), first_position=self._caches[0].length)
        was_training = self.model.training
        self.model.eval()
        logits_GV = self.model.logits(tokens, context, self._caches)
        self.model.train(was_training)
        assert self.model.config.vocab_size is not None
        return gathered_logits(logits_GV[-1:], self.model.config.vocab_size)[0].cpu()


def generate(model: Transformer, prompt_ids: list[int], max_new_tokens: int, **sampling: Any) -> list[int]:
    """All of a :class:`Generation` at once: the new ids, without the prompt and the end-of-document token.

    Args:
        model: uncut (one tensor-parallel rank).
        prompt_ids: at least one; an end-of-document token alone starts a new document.
        max_new_tokens: at most; ``max_seq_len`` may end it sooner.
        sampling: ``temperature`` (0 is greedy), ``top_k``, ``top_p``, ``eod`` (ends the text), ``seed``.
    """
    return list(Generation(model, prompt_ids, max_new_tokens, **sampling))


def _check(
    model: Transformer, prompt_ids: list[int], max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    vocab, limit = model.config.vocab_size or 0, model.config.max_seq_len
    outside = [i for i in prompt_ids if not 0 <= i < vocab]
    for is_wrong, message in (
        (model.tp.size > 1, f"the model is cut over {model.tp.size} tensor-parallel ranks: sample from one that is whole"),
        (not prompt_ids, "the prompt has no token: start with the end-of-document token"),
        (
            bool(outside),
            f"the prompt holds token {outside[:1]}, outside the model's vocabulary of {vocab}: it was made by another tokenizer",
        ),
        (
            len(prompt_ids) >= limit,
            f"the prompt has {len(prompt_ids)} tokens and the model's max_seq_len is {limit}: leave room for one, shorten the prompt",
        ),
        (max_new_tokens < 0, f"max_new_tokens = {max_new_tokens} must be 0 or more"),
        (not temperature >= 0.0, f"temperature = {temperature} must be 0 (greedy) or more"),
        (top_k is not None and top_k < 1, f"top_k = {top_k} must be 1 or more, or left out"),
        (top_p is not None and not 0.0 < top_p <= 1.0, f"top_p = {top_p} must lie in (0, 1], or be left out"),
    ):
        if is_wrong:
            raise UserError(message)
