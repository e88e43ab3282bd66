"""Attention by heads between two exchanges is attention of one process, its gradients too, for any number of key/value heads.

Moving things is exact. What is summed in another order (the gradient of a head that several ranks read, attention's products) is fp64,
so that 1e-12 holds sums of some hundred terms of order 1.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks

SEQ, WIDTH = 16, 6
# (samples, query heads, key/value heads)
SHAPES = {
    2: [(1, 4, 4), (3, 4, 2), (3, 4, 1), (2, 2, 2), (2, 2, 1), (2, 12, 6)],
    4: [(1, 4, 4), (2, 8, 2), (3, 8, 1), (2, 4, 2), (2, 16, 8), (2, 4, 1)],
}
CASES = [pytest.param(world, shape, id=f"cp{world}-b{shape[0]}-n{shape[1]}-k{shape[2]}") for world in SHAPES for shape in SHAPES[world]]
Found = dict[str, tuple[Tensor, Tensor]]  # what, and what one process has there


def whole(shape: tuple[int, int, int]) -> list[Tensor]:
    """q, k and v [B, S, M, H] of all positions, weights of an output, and a key and a value for each head: the same on every rank."""
    (batch, heads, kv_heads), draw = shape, torch.Generator().manual_seed(1)
    sizes = [(batch, SEQ, n, WIDTH) for n in (heads, kv_heads, kv_heads, heads)] + [(kv_heads, WIDTH)] * 2
    return [torch.randn(size, dtype=torch.float64, generator=draw) for size in sizes]


def pieces(shape: tuple[int, int, int], first: int, count: int) -> list[Tensor]:
    """Leaves q, k and v of ``count`` positions that lie in memory as no kernel expects, and the sink's key and value."""
    q, k, v, _, key, value = whole(shape)
    turned = (x[:, first : first + count].permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1) for x in (q, k, v))
    return [x.detach().requires_grad_() for x in (*turned, key, value)]


def attention(leaves: list[Tensor], cp: Any) -> Tensor:
    """With a key and a value beside the positions, as the sink ``kv_bias`` has them: [B, s, N, H]."""
    from megastab.model.attention import attend
    from megastab.model.flash import Extras, attend_with_bias
    from megastab.parallel.ulysses import own_heads, to_heads, to_positions

    q, k, v, key, value = leaves
    call = functools.partial(attend_with_bias, bias=(own_heads(key, cp), own_heads(value, cp)), extras=Extras(None, None))
    return to_positions(attend(*to_heads(q, k, v, cp), call=call), cp)


def moved(shape: tuple[int, int, int], cp: Any) -> Found:
    """What to_heads brings and takes back, and its gradients."""
    from megastab.parallel.ulysses import to_heads, to_positions

    (_, heads, kv_heads), share = shape, SEQ // cp.size
    here = slice(cp.rank * share, (cp.rank + 1) * share)
    leaves = pieces(shape, here.start, share)
    n = heads // cp.size
    mine = [head * kv_heads // heads for head in range(cp.rank * n, (cp.rank + 1) * n)]  # the k/v head of each query head
    q, k, v = to_heads(*leaves[:3], cp)
    all_q, all_k, all_v, weights, *_ = whole(shape)
    found = {"q": (q, all_q[:, :, cp.rank * n : (cp.rank + 1) * n])}
    for name, x, expected in (("k", k, all_k), ("v", v, all_v)):
        found[name] = (x.repeat_interleave(n // x.shape[2], dim=2), expected[:, :, mine])
    found["back"] = (to_positions(q, cp), all_q[:, here])
    # One number over all ranks: each query head's q, k and v weighed alike.
    repeated = [q, *(x.repeat_interleave(n // x.shape[2], dim=2) for x in (k, v))]
    (sum(repeated) * weights[:, :, cp.rank * n : (cp.rank + 1) * n]).sum().backward()
    found["gradient of q"] = (leaves[0].grad, weights[:, here])
    for name, leaf in zip("kv", leaves[1:3], strict=True):
        found[f"gradient of {name}"] = (leaf.grad, weights[:, here].unflatten(2, (kv_heads, -1)).sum(3))
    return found


def attended(shape: tuple[int, int, int], cp: Any) -> Found:
    """Attention and its gradients against one process; those of the sink are summed over the ranks, as data parallelism does."""
    from megastab.parallel import collectives
    from megastab.parallel.grid import Axis

    share = SEQ // cp.size
    here = slice(cp.rank * share, (cp.rank + 1) * share)
    weights = whole(shape)[3]
    ours, one = pieces(shape, here.start, share), pieces(shape, 0, SEQ)
    out, expected = attention(ours, cp), attention(one, Axis())
    (out * weights[:, here]).sum().backward()
    (expected * weights).sum().backward()
    for leaf in ours[3:]:
        collectives.sum_(leaf.grad, cp.group)
    found = {"output": (out, expected[:, here])}
    for name, mine, theirs in zip(("q", "k", "v", "key", "value"), ours, one, strict=True):
        found[f"gradient of {name}"] = (mine.grad, theirs.grad if name in ("key", "value") else theirs.grad[:, here])
    return found


def exchange_all(world: int) -> dict[Any, Any]:
    from megastab.parallel.grid import Grid

    cp = Grid.create(context=world).cp
    out = {}
    for shape in SHAPES[world]:
        found = (moved(shape, cp), attended(shape, cp))
        out[shape] = tuple({name: tuple(x.detach().numpy() for x in pair) for name, pair in part.items()} for part in found)
    return out


@functools.cache
def ranks_of(world: int) -> list[dict[Any, Any]]:
    return run_ranks(world, exchange_all, world)


@pytest.mark.parametrize(("world", "shape"), CASES)
def test_heads_come_and_go_unchanged(world: int, shape: tuple[int, int, int]) -> None:
    for rank in ranks_of(world):
        found = rank[shape][0]
        for name in ("q", "k", "v", "back", "gradient of q"):
            assert np.array_equal(*found[name]), name
        for name in ("gradient of k", "gradient of v"):
            np.testing.assert_allclose(*found[name], rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(("world", "shape"), CASES)
def test_attention_over_ranks_is_that_of_one_process(world: int, shape: tuple[int, int, int]) -> None:
    for rank in ranks_of(world):
        for name, pair in rank[shape][1].items():
            assert np.abs(pair[1]).max() > 1e-3, f"{name}: nothing to compare"
            np.testing.assert_allclose(*pair, rtol=1e-12, atol=1e-12, err_msg=name)


def counted() -> list[tuple[int, ...]]:
    """The messages of one attention layer, forward and backward."""
    from megastab.parallel import collectives
    from megastab.parallel.grid import Grid

    cp, inner, sent = Grid.create(context=2).cp, collectives.exchange_equal, list[tuple[int, ...]]()

    def counting(x: Tensor, group: Any) -> Tensor:
        sent.append(tuple(x.shape))
        return inner(x, group)

    collectives.exchange_equal = counting
    attention(pieces((3, 4, 2), cp.rank * 8, 8), cp).sum().backward()
    return sent


def test_a_layer_sends_two_messages_each_way() -> None:
    """[cp, B, s, heads of a rank, H]: q, k and v together, and the output; the gradients back."""
    there, back = (2, 3, 8, 2 + 1 + 1, WIDTH), (2, 3, 8, 2, WIDTH)
    for sent in run_ranks(2, counted):
        assert sent == [there, back, back, there]


def test_alone_nothing_is_moved() -> None:
    from megastab.parallel.grid import Axis
    from megastab.parallel.ulysses import own_heads, to_heads, to_positions

    q, k, v, *_ = whole((2, 4, 2))
    assert all(x is y for x, y in zip(to_heads(q, k, v, Axis()), (q, k, v), strict=True))
    assert to_positions(q, Axis()) is q and own_heads(k, Axis()) is k
