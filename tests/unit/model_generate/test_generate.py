from __future__ import annotations

from typing import Any

import pytest
import torch

from megastab.config.errors import UserError
from megastab.model.context import Context
from megastab.model.generate import Generation, generate, probabilities
from megastab.model.kv_cache import KVCache
from megastab.model.transformer import Transformer
from tests.unit.model_generate.tiny import VOCAB, tiny_model

PROMPT = [5, 17, 200, 3, 99]


def without_cache(model: Transformer, ids: list[int], count: int) -> list[int]:
    """Greedy, the whole sequence recomputed for every token."""
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            logits_GV = model.logits(torch.tensor([ids]))
        ids.append(int(logits_GV[-1, :VOCAB].argmax()))
    return ids[-count:]


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((arch, changes) for arch in ("llama", "gpt") for changes in (
        {},
        {"sink": "softmax1", "output_gate": "element"},
        {"sink": "learned", "qk_norm": "full", "attention_softcap": 1.5},
        {"sink": "kv_bias", "qk_norm": "head", "output_gate": "head"},
        {"attention_softcap": 1.5},
    )),
    ("llama", {"norm": "dyt", "logit_softcap": 5.0}),
    ("gpt", {"norm_position": "peri", "embedding_norm": True, "embedding_multiplier": 3.0}),
    ("llama", {"norm_position": "post", "embedding_norm": True}),
    ("llama", {"norm_position": "reordered", "logit_softcap": 2.0}),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "changes"), VARIANTS, ids=str)  # llama here has grouped KV heads
def test_cached_logits_equal_recomputed_ones(arch: str, changes: dict[str, Any]) -> None:
    model = tiny_model(arch, **changes).eval()
    tokens = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model.logits(tokens).view(2, 12, -1)
        caches = [KVCache(12) for _ in model.blocks]
        # A prompt, then one at a time, then several at once after a past.
        pieces, first = [], 0
        for length in (5, 1, 1, 1, 4):
            piece = model.logits(tokens[:, first : first + length], Context(2, length, first_position=first), caches)
            pieces.append(piece.view(2, length, -1))
            first += length
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)  # fp32, another order of sums in attention


@pytest.mark.parametrize("arch", ["llama", "gpt"])
def test_greedy_generation_equals_recomputation(arch: str) -> None:
    model = tiny_model(arch)
    made = generate(model, PROMPT, 12, temperature=0.0)
    assert made == without_cache(model.eval(), PROMPT, 12)
    assert len(set(made)) > 1, "a model that repeats itself proves nothing"


def test_generation_leaves_the_training_mode_alone() -> None:
    model = tiny_model()
    assert model.training
    generate(model, PROMPT, 2)
    assert model.training


def test_it_streams() -> None:
    model = tiny_model()
    generation = Generation(model, PROMPT, 6, temperature=0.0)
    first = next(generation)
    assert generation.ids == [first]
    assert [first, *generation] == generate(model, PROMPT, 6, temperature=0.0)


def test_it_says_why_it_stopped() -> None:
    model = tiny_model()
    full = Generation(model, PROMPT, 4, temperature=0.0)
    ids = list(full)
    assert full.stopped == "max_new_tokens"

    longest = Generation(model, PROMPT, 1000, temperature=0.0)
    assert len(PROMPT) + len(list(longest)) == model.config.max_seq_len
    assert longest.stopped == "max_seq_len"

    ended = Generation(model, PROMPT, 4, temperature=0.0, eod=ids[2])
    assert list(ended) == ids[: ids.index(ids[2])]
    assert ended.stopped == "eod"


def test_a_seed_fixes_the_draws() -> None:
    model = tiny_model()
    runs = [generate(model, PROMPT, 12, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_padding_tokens_are_never_drawn() -> None:
    """Padding rows are zero, so that their logits would beat every negative one."""
    model = tiny_model()
    with torch.no_grad():
        model.head.weight[:VOCAB] = -model.norm.weight * 0  # all real logits 0 too: a uniform draw over what is allowed
    drawn = [i for seed in range(20) for i in generate(model, PROMPT, 15, temperature=1.0, seed=seed)]
    assert max(drawn) < VOCAB


LOGITS = torch.tensor([0.5, 2.0, 1.0, -1.0, 1.5]).log_softmax(0)


def test_temperature_zero_is_the_argmax() -> None:
    assert probabilities(LOGITS, 0.0).tolist() == [0, 1, 0, 0, 0]


def test_temperature_scales_logits() -> None:
    torch.testing.assert_close(probabilities(LOGITS, 2.0), (LOGITS / 2).softmax(0))


def test_top_k_keeps_the_k_likeliest_and_renormalises() -> None:
    p = LOGITS.softmax(0)
    expected = p.where(torch.tensor([False, True, False, False, True]), 0.0)
    torch.testing.assert_close(probabilities(LOGITS, top_k=2), expected / expected.sum())


def test_top_k_keeps_exactly_k_of_equal_ones() -> None:
    assert int((probabilities(torch.zeros(10), top_k=3) > 0).sum()) == 3


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, 1), (0.45, 1), (0.47, 2), (0.75, 3), (0.999, 5), (1.0, 5)])
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: int) -> None:
    """Sorted: 0.4586, 0.2782, 0.1687, 0.1023, 0.0228 x 0.98."""
    p = probabilities(torch.tensor([0.46, 0.28, 0.16, 0.08, 0.02]).log(), top_p=top_p)
    assert int((p > 0).sum()) == kept
    assert float(p.sum()) == pytest.approx(1.0)


def test_top_p_measures_what_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # Of the two left, the first has 4/7 = 0.571 of the mass.
    assert int((probabilities(logits, top_k=2, top_p=0.55) > 0).sum()) == 1


def test_draws_follow_the_distribution() -> None:
    model, eod = tiny_model(), None
    with torch.no_grad():
        expected = probabilities(model.logits(torch.tensor([PROMPT]))[-1, :VOCAB], 0.7, 3)
    drawn = torch.tensor([generate(model, PROMPT, 1, temperature=0.7, top_k=3, seed=s, eod=eod)[0] for s in range(600)])
    share = torch.bincount(drawn, minlength=VOCAB) / 600
    assert float((share - expected).abs().max()) < 0.08  # 4 standard deviations of a share of 600


@pytest.mark.parametrize(
    ("prompt", "changes", "said"),
    [
        ([], {}, "no token"),
        (list(range(24)), {}, "max_seq_len is 24"),
        ([VOCAB], {}, "outside the model's vocabulary"),
        (PROMPT, {"temperature": -1.0}, "temperature"),
        (PROMPT, {"temperature": float("nan")}, "temperature"),
        (PROMPT, {"top_k": 0}, "top_k"),
        (PROMPT, {"top_p": 0.0}, "top_p"),
        (PROMPT, {"top_p": 1.5}, "top_p"),
    ],
)
def test_what_cannot_be_is_refused(prompt: list[int], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        generate(tiny_model(), prompt, 3, **changes)
