"""DeepSpeed's universal checkpoints at another data-parallel size: the moments stay valid, because Q does not move.

Every rank has the same gradient, a function of (parameter, step) whose mean over 4 or 2 ranks is exact, so that bits can be compared.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import megastab
from tests import jobs
from tests.layouts import Layout
from tests.layouts import config_of as trainer_config
from tests.ranks import run_ranks
from tests.unit.engine.test_engine_library import masters
from tests.unit.optim.test_optim_ortho_layouts import MODEL, moments

SHAPES = [(7, 48), (48,), (20, 48), (13, 20), (2, 768), (5, 64)]
HALF, WHOLE = 3, 6
CASES = {"zero1": (1, "fp32", False), "zero3": (3, "fp32", False), "bf16": (1, "bf16", False), "zero2-offload": (2, "fp32", True)}


class Linear(nn.Module):
    """A loss linear in the weights."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.ParameterList(nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES)

    def forward(self, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 + step)
        factors = [torch.randint(-8, 9, shape, generator=generator) / 8 for shape in SHAPES]
        return sum((w * c.to(w.dtype)).sum() for w, c in zip(self.w, factors, strict=True))  # type: ignore[return-value]


def config_of(name: str, world: int, seed: int = 2, universal: bool = False) -> dict[str, Any]:
    stage, dtype, offload = CASES[name]
    config: dict[str, Any] = {
        "train_batch_size": world,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **({"offload_optimizer": {"device": "cpu"}} if offload else {})},
        "optimizer": {"type": "OrthoAdam", "params": {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.1, "seed": seed}},
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    return {**config, "checkpoint": {"load_universal": True}} if universal else config


def train(config: dict[str, Any], folder: str, begin: int) -> Any:
    """On a rank: steps from ``begin`` on, saving at half the way; masters, or how loading was refused."""
    from megastab.config.errors import UserError
    from megastab.parallel.collectives import PeerFailed

    engine, *_ = megastab.initialize(model=Linear(), config=config)
    try:
        if begin:
            engine.load_checkpoint(folder, tag="half_universal")
        for step in range(begin, WHOLE):
            if step == HALF and not begin:
                engine.save_checkpoint(
                    folder, tag="half", client_state={"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
                )
            engine.backward(engine(step))
            engine.step()
    except (UserError, PeerFailed) as error:
        return str(error)
    return masters(engine)


def converted(folder: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    arguments = {"input_folder": str(folder / "half"), "output_folder": str(folder / "half_universal"), "strict": True}
    defaults = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "inject_missing_state": False}
    ds_to_universal.main(Namespace(**arguments, **defaults))
    (folder / "latest_universal").write_text("half_universal")


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [("zero1", "zero1"), ("zero3", "zero3"), ("bf16", "bf16"), ("zero1", "zero2-offload")],
)
def test_moments_stay_valid_at_another_data_parallel_size_and_stage(saved: str, loaded: str, tmp_path: Path) -> None:
    straight = run_ranks(4, train, config_of(saved, 4), str(tmp_path), 0)
    run_ranks(1, converted, tmp_path)
    resumed = run_ranks(2, train, config_of(loaded, 2, universal=True), str(tmp_path), HALF)
    expected, found = jobs.merge(straight)[0], jobs.merge(resumed)[0]
    assert expected.keys() == found.keys()
    for matrix in expected:
        assert np.array_equal(found[matrix], expected[matrix]), (matrix, float(np.abs(found[matrix] - expected[matrix]).max()))
    if saved == "zero1":
        refused = run_ranks(2, train, config_of(loaded, 2, seed=3, universal=True), str(tmp_path), HALF)
        assert all("seed 2 and not 3" in said for said in refused), "DeepSpeed overwrites the groups: the next step sees it"


# -- beside tensor parallelism and a pipeline: the trainer's engines, the same ranks of these and others of data parallelism --------


def states(job: jobs.Job) -> dict[str, list[jobs.Piece]]:
    wrapper = job.built.engine.optimizer
    client = getattr(wrapper, "optimizer", wrapper)
    return {"weights": jobs.masters(job), **{key: moments(job, client, key) for key in ("exp_avg", "exp_avg_sq")}}


def saved(layout: Layout, dtype: str, folder: str) -> dict[str, list[jobs.Piece]]:
    """On a rank: what it holds when it saves after two steps."""
    job = jobs.start(trainer_config(layout, "OrthoAdam", dtype, model=MODEL))
    for _ in range(2):
        job.step()
    job.built.engine.save_checkpoint(folder, tag="half", client_state={"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}})
    return states(job)


def loaded(layout: Layout, dtype: str, folder: str) -> dict[str, list[jobs.Piece]]:
    """On a rank: what it holds after loading."""
    job = jobs.start(trainer_config(layout, "OrthoAdam", dtype, model=MODEL, ds__checkpoint={"load_universal": True}))
    job.built.engine.load_checkpoint(folder, tag="half_universal")
    return states(job)


@pytest.mark.parametrize(
    ("before", "after", "dtype"),
    [
        (Layout(4, tp=2, zero=1), Layout(2, tp=2, zero=2), "fp32"),
        (Layout(4, pp=2, zero=1, accumulation=2), Layout(2, pp=2, zero=1, accumulation=2), "fp32"),
        (Layout(4, tp=2, zero=1), Layout(2, tp=2, zero=1), "bf16"),
    ],
    ids=str,
)
def test_every_weight_and_moment_arrives_where_it_belongs(before: Layout, after: Layout, dtype: str, tmp_path: Path) -> None:
    kept = run_ranks(before.world, saved, before, dtype, str(tmp_path))
    run_ranks(1, converted, tmp_path)
    found = run_ranks(after.world, loaded, after, dtype, str(tmp_path))
    for key in kept[0]:
        (expected, _), (mine, drift) = (jobs.merge(rank[key] for rank in ranks) for ranks in (kept, found))
        assert mine.keys() == expected.keys() and drift == 0.0
        assert all(np.array_equal(mine[name], values) and np.abs(values).max() > 0 for name, values in expected.items()), key
