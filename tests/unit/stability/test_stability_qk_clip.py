"""QK-clip: the factor of every head, on masters cut anywhere, and logits that come out at the threshold."""

from __future__ import annotations

import math

import pytest
import torch

from megastab.config.errors import UserError
from megastab.config.library import load_block
from megastab.model.logit_watch import LargestLogits, largest_logit
from megastab.parallel.grid import Grid
from megastab.parallel.param_info import ParamInfo, Part
from megastab.stability.controller import Controller
from megastab.stability.events import events_of_step
from megastab.stability.fixed_clip import FixedClip
from megastab.stability.policy import GOOD
from megastab.stability.qk_clip import QKClip, WatchedLayer, factors
from megastab.wrappers.adapter import Fragment
from tests.unit.stability.test_stability_fixed_clip import Norms

WIDTH, HEADS, KV_HEADS, HEAD_DIM = 6, 4, 2, 3


def test_factors_are_those_of_the_definition_and_a_negative_maximum_gives_one() -> None:
    # ALGORITHMS 13.7: tau 100; the sign trap is that 100 / -3 would be a factor whose root is not a number
    found = factors(torch.tensor([50.0, 100.0, 150.0, 400.0, -3.0, -math.inf, math.nan]), 100.0)
    assert torch.allclose(found, torch.tensor([1.0, 1.0, 2 / 3, 0.25, 1.0, 1.0, 1.0]))
    assert found[2].sqrt().item() == pytest.approx(0.8164966)


def fused(seed: int = 0) -> tuple[torch.Tensor, list[Part]]:
    """q, k and v one after another, [rows, WIDTH], as one rank holds them."""
    rows = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
    parts = [Part.whole(f"layers.1.attention.{role}", role, count) for role, count in rows.items()]  # type: ignore[arg-type]
    return torch.randn(sum(rows.values()), WIDTH, generator=torch.Generator().manual_seed(seed)), parts


def fragments_of(weight: torch.Tensor, parts: list[Part], cuts: list[int]) -> list[Fragment]:
    """Pieces of the flat master as ZeRO's boundaries at ``cuts`` would leave them."""
    info, out, offset = ParamInfo(tuple(parts), 1, WIDTH), [], 0
    flat = weight.view(-1)
    for part in parts:
        stop = offset + part.rows * WIDTH
        bounds = [offset, *[cut for cut in cuts if offset < cut < stop], stop]
        out += [
            Fragment(torch.nn.Parameter(weight), info, part, a - offset, flat[a:b], flat, a)
            for a, b in zip(bounds, bounds[1:], strict=False)
        ]
        offset = stop
    return out


def clip_of(largest: list[float], threshold: float = 10.0, balance: float = 0.5) -> QKClip:
    watch = LargestLogits(threshold)
    watch._found_N = torch.tensor(largest)
    return QKClip(threshold, balance, (2, HEADS, KV_HEADS, HEAD_DIM), [WatchedLayer(1, 0, watch)])


@pytest.mark.parametrize("cuts", [[], [1, 19, 20, 55, 73, 100]], ids=["whole", "cut anywhere"])
@pytest.mark.parametrize("balance", [0.5, 0.0, 1.0])
def test_each_group_shrinks_by_its_largest_head_wherever_the_master_is_cut(cuts: list[int], balance: float) -> None:
    weight, parts = fused()
    before = weight.clone()
    clip = clip_of([5.0, 40.0, -3.0, 10.0], balance=balance)
    assert clip.clip_fragments_(fragments_of(weight, parts, cuts))
    gamma = torch.tensor([0.25, 1.0])  # of the two key heads: 10 / 40; 10 is not above 10
    rows = HEADS * HEAD_DIM
    wanted = before.clone()
    wanted[:rows] *= (gamma**balance).repeat_interleave(rows // 2)[:, None]
    wanted[rows : rows + KV_HEADS * HEAD_DIM] *= (gamma ** (1 - balance)).repeat_interleave(HEAD_DIM)[:, None]
    assert torch.allclose(weight, wanted, rtol=1e-6)
    assert [(head.layer, head.head, head.largest) for head in clip.clipped] == [(1, 1, 40.0)] and clip.largest == 40.0


def test_biases_shrink_with_their_matrices_and_other_layers_are_left_alone() -> None:
    name = "layers.1.attention"
    biases = [Part.whole(f"{name}.q.bias", "bias", 12), Part.whole(f"{name}.k.bias", "bias", 6), Part.whole(f"{name}.v.bias", "bias", 6)]
    flat = torch.ones(24)
    info = ParamInfo(tuple(biases), 1, None)
    pieces = [
        Fragment(torch.nn.Parameter(flat), info, p, 0, flat[a:b], flat, a)
        for p, a, b in zip(biases, (0, 12, 18), (12, 18, 24), strict=True)
    ]
    other, parts = fused()
    elsewhere = [f._replace(info=ParamInfo(tuple(parts), 0, WIDTH)) for f in fragments_of(other, parts, [])]
    untouched = other.clone()
    assert clip_of([40.0, 0.0, 0.0, 0.0]).clip_fragments_(pieces + elsewhere)
    assert flat.tolist() == [0.5] * 6 + [1.0] * 6 + [0.5] * 3 + [1.0] * 3 + [1.0] * 6
    assert torch.equal(other, untouched)


def test_nothing_above_the_threshold_touches_nothing_and_what_was_seen_is_forgotten() -> None:
    weight, parts = fused()
    before, clip = weight.clone(), clip_of([9.0, 10.0, -1.0, 3.0])
    assert not clip.clip_fragments_(fragments_of(weight, parts, [])) and torch.equal(weight, before)
    assert clip.largest == 10.0 and not clip.clipped
    assert not clip.clip_fragments_(fragments_of(weight, parts, [])) and clip.largest == -math.inf  # nothing new was seen
    skipped = clip_of([1e9] * 4)
    skipped.forget()
    assert not skipped.clip_fragments_(fragments_of(weight, parts, [])) and torch.equal(weight, before)


def heads_of(weight: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [B, S, N, H] and keys [B, S, K, H] of tokens [B, S, WIDTH]."""
    q, k, _ = (x @ weight.T).split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], dim=-1)
    return q.unflatten(-1, (HEADS, HEAD_DIM)), k.unflatten(-1, (KV_HEADS, HEAD_DIM))


def causal_logits(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[B, N, S, L] with the future at -inf, the dense way."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    logits = torch.einsum("bsnh,blnh->bnsl", q, k) / q.shape[-1] ** 0.5
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1 + k.shape[1] - q.shape[1])
    return logits.masked_fill(future, -math.inf)


def test_the_same_tokens_reach_the_threshold_and_no_more() -> None:
    weight, parts = fused()
    x = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(1))
    watch = LargestLogits(15.0)
    q, k = heads_of(weight, x)
    logits = causal_logits(q, k)
    watch.see(q.transpose(1, 2), k.transpose(1, 2), logits.logsumexp(-1))
    reached = logits.amax((0, 2, 3))
    assert reached[:2].max() < 15 < reached.max(), "the case is telling"
    clip = QKClip(15.0, 0.5, (2, HEADS, KV_HEADS, HEAD_DIM), [WatchedLayer(1, 0, watch)])
    assert clip.clip_fragments_(fragments_of(weight, parts, [7, 70]))
    after = causal_logits(*heads_of(weight, x)).amax((0, 2, 3))
    groups = reached.view(KV_HEADS, -1).amax(-1)
    assert torch.allclose(after.view(KV_HEADS, -1).amax(-1), groups.clamp(max=15.0), rtol=1e-5)
    assert {head.head for head in clip.clipped} == set((reached > 15).nonzero().flatten().tolist())


def test_a_head_is_exact_above_the_threshold_and_bounded_below_it() -> None:
    draw = torch.Generator().manual_seed(2)
    q, k = 2 * torch.randn(2, 5, HEADS, HEAD_DIM, generator=draw), 2 * torch.randn(2, 8, KV_HEADS, HEAD_DIM, generator=draw)
    logits = causal_logits(q, k)  # the last 5 of 8 positions
    exact, lse = logits.amax((0, 2, 3)), logits.logsumexp(-1)
    watch = LargestLogits(float(exact.median()))
    turned = (q.transpose(1, 2), k.transpose(1, 2))
    watch.see(*turned, lse)
    found = watch.take()
    assert found is not None and watch.take() is None
    over = lse.amax((0, 2)) > watch.threshold
    assert over.any() and torch.allclose(found[over], exact[over], rtol=1e-6) and (found >= exact - 1e-6).all()
    for _ in range(2):  # micro-batches: the largest of both
        watch.see(*turned, lse), watch.see(0.1 * turned[0], turned[1], 0.1 * lse)
    again = watch.take()
    assert again is not None and torch.equal(again, found)
    watch.see(*turned)  # a kernel that keeps its log-sum-exp: exact everywhere
    alone = watch.take()
    assert alone is not None and torch.allclose(alone, exact, rtol=1e-6)


def test_chunks_of_queries_see_all_keys_and_no_future(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megastab.model.logit_watch.CHUNK_ELEMENTS", 20)
    draw = torch.Generator().manual_seed(3)
    for seq, length in ((7, 7), (3, 10), (1, 6)):
        q, k = torch.randn(2, seq, 1, HEAD_DIM, generator=draw), torch.randn(2, length, 1, HEAD_DIM, generator=draw)
        assert torch.allclose(largest_logit(q[:, :, 0], k[:, :, 0]), causal_logits(q, k).amax())


# -- in the controller -----------------------------------------------------------------------------------------------------


class NormsAndMasters(Norms):
    """An adapter that tells norms and holds one fused master."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.parts = fused()

    def fragments(self) -> list[Fragment]:
        return fragments_of(self.weight, self.parts, [])


def test_a_step_that_clips_is_an_event_with_its_heads_and_a_skipped_one_forgets() -> None:
    adapter, clip = NormsAndMasters(), clip_of([5.0, 40.0, -3.0, 12.0])
    controller = Controller(adapter, Grid(), FixedClip(0.0), qk_clip=clip)
    adapter.tell(1.0)
    assert adapter.edit() is True and controller.scalars() == {
        "clip_rate": 0.0,
        "clipped_norm": 1.0,
        "largest_logit": 40.0,
        "qk_clipped": 2.0,
    }
    record = controller.record(step=3, loss=1.0, lr=0.0, tokens=1, seconds=0.0)
    (event,) = events_of_step(controller, record, GOOD)
    assert event.kind == "qk_clip" and event.reason == "2 heads had a logit above 10, the largest 40 in layers.1, head 1"
    assert event.facts["heads"] == [{"layer": 1, "head": 1, "largest": 40.0}, {"layer": 1, "head": 3, "largest": 12.0}]
    clip.watched[0].logits._found_N = torch.full((HEADS,), 1e9)
    adapter.tell(math.inf)
    assert not clip.clipped and clip.watched[0].logits.take() is None and "qk_clipped" not in controller.scalars()


def test_a_foreign_model_has_no_logits_to_tell() -> None:
    with pytest.raises(UserError, match="qk_clip needs attention that tells its largest logits"):
        load_block({"megastab": {"stability": {"qk_clip": {}}}}, {}, must_have=True)
