"""From the one JSON to a checked, completed, immutable ``Config``: read, override, check names, check values, complete.

Nothing here imports torch or DeepSpeed, so that a wrong key is reported within a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megastab.config.batch import complete_batch
from megastab.config.complete import complete
from megastab.config.config import Config
from megastab.config.deepspeed_keys import wrong_names
from megastab.config.errors import UserError
from megastab.config.layout import divide, world_from_environment
from megastab.config.optimizers import wrong_optimizer
from megastab.config.refusals import refused
from megastab.config.rules import Facts, broken_rules
from megastab.config.schema import Megastab
from megastab.config.schema_errors import explain
from megastab.config.settings import without_nulls
from megastab.config.source import apply_overrides, read_source


def load_config(source: str | Path | dict[str, Any], overrides: Sequence[str] = (), world_size: int | None = None) -> Config:
    """Read ``source`` (a path or a dict), apply ``a.b.c=value`` overrides, and check it for ``world_size`` ranks.

    ``world_size`` defaults to the launcher's ``WORLD_SIZE``. Everything wrong is told at once, in one ``UserError``.
    """
    deepspeed, name = read_source(source)
    apply_overrides(deepspeed, overrides)
    megastab = _take_block(deepspeed, name)
    _raise_if(refused(deepspeed, megastab) + wrong_optimizer(deepspeed), name)
    layout = divide(world_from_environment() if world_size is None else world_size, megastab.parallel)
    completed, completions = complete(without_nulls(deepspeed), megastab)
    completed.update(complete_batch(completed, layout))
    _raise_if(broken_rules(Facts(megastab, completed, layout)), name)
    return Config(megastab=megastab, deepspeed=completed, completions=completions, layout=layout)


def _take_block(deepspeed: dict[str, Any], name: str) -> Megastab:
    """Our block, validated and taken out of ``deepspeed``; unknown names of both owners are reported together."""
    block = deepspeed.pop("megastab", None)
    problems = wrong_names(deepspeed)
    try:
        megastab = Megastab.model_validate({} if block is None else block)
    except ValidationError as error:
        missing = ['the "megastab" section is missing.'] if block is None else explain(error)
        _raise_if(problems + missing, name)
        raise
    _raise_if(problems, name)
    return megastab


def _raise_if(problems: list[str], name: str) -> None:
    if problems:
        raise UserError("\n  ".join([f"{name} cannot be used:", *problems]))
