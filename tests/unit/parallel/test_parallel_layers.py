"""Parallel layers against the whole product on one process: outputs and every gradient, with and without sequence parallel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from megastab.parallel.grid import ALONE
from megastab.parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megastab.parallel.param_info import Part
from tests.ranks import run_ranks

TOKENS, WIDTH, OUT, VOCAB = 8, 6, 12, 16


def problem() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"x": (TOKENS, WIDTH), "a": (OUT, WIDTH), "b": (OUT, WIDTH), "bias": (2 * OUT,), "h": (TOKENS, OUT), "down": (OUT, WIDTH)}
    shapes |= {"down_bias": (WIDTH,), "table": (VOCAB, WIDTH), "dy": (TOKENS, 2 * OUT), "dz": (TOKENS, WIDTH)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def expected() -> dict[str, torch.Tensor]:
    p = {name: value.requires_grad_() for name, value in problem().items()}
    ids = torch.arange(TOKENS) * 7 % VOCAB
    y = F.linear(p["x"], torch.cat([p["a"], p["b"]]), p["bias"])
    z = p["h"] @ p["down"] + p["down_bias"]
    e = F.embedding(ids, p["table"])
    torch.autograd.backward([y, z, e], [p["dy"], p["dz"], p["dz"]])
    out = {"y": y, "z": z, "e": e} | {f"d{n}": p[n].grad for n in ("x", "a", "b", "bias", "h", "down", "down_bias", "table")}
    return {name: value.detach() for name, value in out.items()}


def deviations(sequence: bool) -> dict[str, float]:
    """On a rank of two: how far each piece it computes is from the same piece of the whole."""
    from megastab.parallel.grid import Grid

    tp = Grid.create(2, sequence=sequence).tp
    p, want = problem(), expected()
    tokens = slice(tp.rank * TOKENS // 2, (tp.rank + 1) * TOKENS // 2) if sequence else slice(None)
    rows = slice(tp.rank * OUT // 2, (tp.rank + 1) * OUT // 2)
    both = torch.cat([torch.arange(OUT)[rows], torch.arange(OUT)[rows] + OUT])  # a's rows, then b's
    words = slice(tp.rank * VOCAB // 2, (tp.rank + 1) * VOCAB // 2)
    parts = tuple(Part.cut(name, "up", OUT, tp) for name in "ab")
    column = ColumnParallelLinear(parts, WIDTH, tp, 0, bias=True).double()
    row = RowParallelLinear(Part.cut("down", "down", OUT, tp), WIDTH, tp, 0, bias=True).double()
    embedding = VocabParallelEmbedding("table", VOCAB, WIDTH, tp).double()
    with torch.no_grad():
        column.weight.copy_(torch.cat([p["a"], p["b"]])[both])
        column.bias.copy_(p["bias"][both])
        row.weight.copy_(p["down"][rows])
        row.bias.copy_(p["down_bias"])
        embedding.weight.copy_(p["table"][words])
    x, h = p["x"][tokens].requires_grad_(), p["h"][:, rows].requires_grad_()
    y, z, e = column(x), row(h), embedding(torch.arange(TOKENS) * 7 % VOCAB)
    torch.autograd.backward([y, z, e], [p["dy"][:, both], p["dz"][tokens], p["dz"][tokens]])
    bias = row.bias.grad.clone()
    if row.bias.megastab_info.grad_group is not None:
        torch.distributed.all_reduce(bias, group=row.bias.megastab_info.grad_group)
    whole = torch.cat([want["da"], want["db"]])
    found = {
        "y": y - want["y"][:, both], "z": z - want["z"][tokens], "e": e - want["e"][tokens], "dx": x.grad - want["dx"][tokens],
        "dweight": column.weight.grad - whole[both], "dbias": column.bias.grad - want["dbias"][both], "dh": h.grad - want["dh"][:, rows],
        "ddown": row.weight.grad - want["ddown"][rows], "ddown_bias": bias - want["ddown_bias"],
        "dtable": embedding.weight.grad - want["dtable"][words],
    }  # fmt: skip
    return {name: float(value.abs().max()) for name, value in found.items()}


@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence"])
def test_two_ranks_compute_the_whole_product(sequence: bool) -> None:
    """fp64, so that 1e-12 leaves no room for a missing term."""
    for rank in run_ranks(2, deviations, sequence):
        assert max(rank.values()) < 1e-12, rank


def test_alone_the_layers_are_torchs() -> None:
    p = problem()
    column = ColumnParallelLinear((Part.whole("a", "up", OUT),), WIDTH, ALONE, 0).double()
    row = RowParallelLinear(Part.whole("down", "down", OUT), WIDTH, ALONE, 0).double()
    embedding = VocabParallelEmbedding("table", VOCAB, WIDTH, ALONE).double()
    with torch.no_grad():
        column.weight.copy_(p["a"])
        row.weight.copy_(p["down"])
        embedding.weight.copy_(p["table"])
    assert column.bias is None and row.bias is None
    assert torch.equal(column(p["x"]), F.linear(p["x"], p["a"])) and torch.equal(row(p["h"]), p["h"] @ p["down"])
    assert torch.equal(embedding(torch.tensor([3, 0])), p["table"][[3, 0]])


def test_parameters_say_what_they_hold() -> None:
    def facts(parameter: Any) -> Any:
        return parameter.megastab_info

    column = ColumnParallelLinear((Part.whole("x.gate", "gate", 4), Part.whole("x.up", "up", 4)), WIDTH, ALONE, 2, bias=True)
    assert facts(column.weight).name == "x.gate+x.up" and facts(column.weight).layer == 2 and facts(column.weight).width == WIDTH
    assert facts(column.bias).name == "x.gate.bias+x.up.bias" and facts(column.bias).width is None and not facts(column.bias).decays
