"""Draws are functions of names and places: any cut gives the same numbers, and a rank draws only tiles it holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megastab.parallel import rng
from tests import jobs
from tests.layouts import Layout, config_of
from tests.ranks import run_ranks

LENGTH = 3 * rng.TILE + 1000


def drawn(start: int, stop: int, std: float = 0.5, seed: int = 3, name: str = "w") -> torch.Tensor:
    out = torch.empty(stop - start)
    rng.fill_normal_(out, std, seed, name, start)
    return out


@pytest.mark.parametrize("cuts", [[1], [rng.TILE], [rng.TILE - 1, rng.TILE + 1], [5, 2 * rng.TILE, LENGTH - 1]], ids=str)
def test_any_cut_gives_the_same_numbers(cuts: list[int]) -> None:
    bounds = [0, *cuts, LENGTH]
    assert torch.equal(torch.cat([drawn(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]), drawn(0, LENGTH))


def test_numbers_are_those_of_ever() -> None:
    """Philox and its normals are promised by numpy; a change here would change every run's initial weights."""
    assert drawn(0, 3).tolist() == pytest.approx([0.15017347, -0.03637642, 0.63672870], rel=1e-6)


def test_seed_name_and_tile_each_make_another_stream() -> None:
    streams = [drawn(0, rng.TILE), drawn(0, rng.TILE, seed=4), drawn(0, rng.TILE, name="v"), drawn(rng.TILE, 2 * rng.TILE)]
    for i, a in enumerate(streams):
        for b in streams[:i]:
            assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.02  # 65536 pairs: sigma 0.004


def test_std_and_shape_of_the_distribution() -> None:
    x = drawn(0, LENGTH, std=0.5)
    assert x.mean().abs() < 0.005 and abs(float(x.std()) - 0.5) < 0.005  # sigma 0.001
    assert abs(float((x / 0.5).pow(4).mean()) - 3) < 0.1, "a normal's fourth moment"


def count_draws(config: dict[str, Any]) -> tuple[set[tuple[str, int]], int, set[tuple[str, int]]]:
    """On a rank: the tiles drawn while building, how many draws that took, and the tiles that hold what the rank holds."""
    tiles: list[tuple[str, int]] = []
    original = rng._draw_tile

    def draw(seed: int, name: str, tile: int) -> Any:
        tiles.append((name, tile))
        return original(seed, name, tile)

    rng._draw_tile = draw  # type: ignore[assignment]
    job = jobs.start(config)
    from megastab.wrappers.adapter import split_parts
    from megastab.wrappers.zero3 import held

    needed = set()
    for parameter in job.built.adapter.parameters():
        flat, first = held(parameter)
        for f in split_parts(parameter, job.built.adapter.info(parameter), first, flat, flat):
            if f.part.role in ("norm", "bias"):
                continue
            start = f.part.start * (f.info.width or 1) + f.start
            needed |= {(f.part.name, tile) for tile in range(start // rng.TILE, -(-(start + f.low.numel()) // rng.TILE))}
    return set(tiles), len(tiles), needed


@pytest.mark.parametrize("layout", [Layout(2, tp=2), Layout(2, pp=2, accumulation=2), Layout(2, zero=3), Layout(4, tp=2, zero=3)], ids=str)
def test_a_rank_draws_only_tiles_it_holds(layout: Layout) -> None:
    """Matrices of 4 tiles (vocabulary 2048, width 128), so that half a matrix is half the tiles."""
    model = {"hidden_size": 128, "num_heads": 4, "num_kv_heads": 4, "ffn_hidden_size": 2048, "vocab_size": 2048}
    ranks = run_ranks(layout.world, count_draws, config_of(layout, model=model))
    for tiles, draws, needed in ranks:
        assert tiles == needed and draws <= 1.2 * len(needed), "no tile of another rank, hardly any twice"
    everything = set().union(*(tiles for tiles, _, _ in ranks))
    assert max(len(tiles) for tiles, _, _ in ranks) <= 0.75 * len(everything)


# -- dropout -------------------------------------------------------------------------------------------------------------


def mask(rate: float = 0.3, site: int = 17, samples: int = 40, positions: int = 50, width: int = 64, first: int = 0) -> torch.Tensor:
    ids = torch.arange(first, first + samples).repeat_interleave(positions)
    places = torch.arange(positions).repeat(samples)
    return rng.dropout(torch.ones(samples * positions, width), rate, site, ids, places).view(samples, positions, width)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_dropout_keeps_the_share_and_the_mean(rate: float) -> None:
    kept = mask(rate)
    assert all(value == 0.0 or value == pytest.approx(1 / (1 - rate)) for value in kept.unique().tolist())
    assert float((kept > 0).float().mean()) == pytest.approx(1 - rate, abs=0.01)  # 128000 draws: sigma 0.0014
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.05)


def test_dropout_is_independent_over_samples_positions_channels_and_sites() -> None:
    kept = (mask(0.5) > 0).float()
    pairs = {
        "sample": (kept[1:], kept[:-1]),
        "position": (kept[:, 1:], kept[:, :-1]),
        "channel": (kept[:, :, 1:], kept[:, :, :-1]),
        "far channel": (kept[:, :, 32:], kept[:, :, :-32]),
        "site": (kept, (mask(0.5, site=18) > 0).float()),
        "far sample": (kept, (mask(0.5, first=1 << 33) > 0).float()),
    }
    for what, (a, b) in pairs.items():
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.015, what  # sigma 0.003
    for axes, size in (((0, 1), 2000), ((1, 2), 3200), ((0, 2), 2560)):  # share kept per channel, sample, position
        shares = kept.mean(axes)
        assert float((shares - 0.5).abs().max()) < 5 * 0.5 / size**0.5, "no channel, sample or position is favoured"


def test_dropout_of_a_token_depends_on_its_own_place_only() -> None:
    x = torch.randn(6, 32)
    samples, places = torch.tensor([7, 7, 9, 9, 12, 1 << 40]), torch.tensor([0, 1, 0, 5, 3, 2])
    whole = rng.dropout(x, 0.4, 5, samples, places)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    assert torch.equal(rng.dropout(x[order], 0.4, 5, samples[order], places[order]), whole[order])
    assert torch.equal(rng.dropout(x[2:4], 0.4, 5, samples[2:4], places[2:4]), whole[2:4])


def test_dropout_gradient_has_the_mask() -> None:
    x = torch.randn(4, 16, requires_grad=True)
    ids = torch.arange(4)
    y = rng.dropout(x, 0.5, 5, ids, ids)
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(y != 0, 2.0, 0.0))


def test_dropout_keeps_bf16() -> None:
    ids = torch.arange(4)
    assert rng.dropout(torch.ones(4, 8, dtype=torch.bfloat16), 0.1, 5, ids, ids).dtype == torch.bfloat16


def test_sites_differ_by_seed_and_place() -> None:
    sites = {rng.dropout_site(seed, layer, kind) for seed in (1, 2) for layer in range(50) for kind in ("attention", "mlp")}
    assert len(sites) == 200 and all(-(1 << 31) <= site < 1 << 31 for site in sites)
