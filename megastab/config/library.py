"""The JSON of somebody else's loop: DeepSpeed's part checked and completed as for the trainer; of ours, stability and telemetry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megastab.config.complete import Completion, complete
from megastab.config.deepspeed_keys import wrong_names
from megastab.config.errors import UserError
from megastab.config.optimizers import canonical_type, wrong_optimizer
from megastab.config.refusals import REFUSED_VALUES, refused
from megastab.config.schema import Megastab, RunConfig
from megastab.config.schema_errors import explain
from megastab.config.schema_stability import StabilityConfig
from megastab.config.schema_telemetry import TelemetryConfig
from megastab.config.section import Section
from megastab.config.settings import read, without_nulls
from megastab.config.source import read_source

# What the trainer refuses because it has its own way, and what is the loop's own business here.
OF_THE_LOOP = (
    "activation_checkpointing",
    "data_efficiency",
    "data_parallel_size",
    "gradient_allreduce_op",
    "managed_gradient_accumulation",
    "pipeline",
    "scheduler",
    "sequence_parallel_size",
)

# Refused as by the trainer, with the way out that a foreign model has.
WAYS_OUT = {
    "compile": "DeepSpeed's own compiler replaces hooks megastab relies on: compile the model's blocks with torch.compile.",
    "expert_parallel": "experts have data-parallel groups of their own, which no statistic here knows: leave it out.",
    "tensor_parallel": "AutoTP makes its groups after the norm's are fixed: pass an mpu, or leave it out.",
}


class LibraryBlock(Section):
    """What the ``"megastab"`` block may say beside a foreign model."""

    stability: StabilityConfig = StabilityConfig()
    """The methods that keep the run stable."""
    telemetry: TelemetryConfig | None = None
    """Looks at the matrices; ``null``: none."""


@dataclass(frozen=True)
class LibraryConfig:
    """A checked JSON."""

    block: LibraryBlock
    """Our part."""
    deepspeed: dict[str, Any]
    """DeepSpeed's, completed."""
    completions: tuple[Completion, ...]
    """The keys that were written, with the reason of each."""

    @property
    def stability(self) -> StabilityConfig:
        """Of our part, the methods."""
        return self.block.stability

    @property
    def optimizer(self) -> tuple[str, dict[str, Any]] | None:
        """(torch.optim's class name, its arguments) of an optimizer we build; None for any other."""
        kind = canonical_type(str(read(self.deepspeed, "optimizer.type", "")))
        params = read(self.deepspeed, "optimizer.params", {})
        return None if kind is None else (kind, {key: tuple(v) if isinstance(v, list) else v for key, v in params.items()})


def load_library_config(source: str | Path | dict[str, Any], has_optimizer: bool) -> LibraryConfig:
    """Read and check a JSON; everything wrong is told at once, in one ``UserError``.

    Args:
        source: a path or a dict (left as it is).
        has_optimizer: the caller brings an optimizer, so that the JSON's is not read.
    """
    deepspeed, name = read_source(source)
    problems, ours = _take_block(deepspeed)
    problems += wrong_names(deepspeed)
    _raise_if(problems, name)
    block = Megastab.model_construct(stability=ours.stability, run=RunConfig(dir="."))  # no model: it is the caller's
    _raise_if(_refused(deepspeed, block) + ([] if has_optimizer else _wrong_optimizer(deepspeed)), name)
    completed, completions = complete(without_nulls(deepspeed), block)
    return LibraryConfig(ours, completed, completions)


def load_block(source: str | Path | dict[str, Any], in_force: dict[str, Any], must_have: bool) -> LibraryBlock:
    """Our block for an engine that exists.

    Args:
        source: a path or a dict (left as it is).
        in_force: the JSON the engine was built from; of DeepSpeed's part only what breaks the masters or the norm is refused.
        must_have: refuse a JSON without a ``"megastab"`` block; otherwise it means the defaults.
    """
    deepspeed, name = read_source(source)
    if must_have and "megastab" not in deepspeed:
        raise UserError(f'{name} has no "megastab" section: write {{"megastab": {{"stability": {{...}}}}}}.')
    problems, block = _take_block(deepspeed)
    problems += [
        f"{path} = {str(bad).lower()} of the engine is refused: {why}"
        for path, bad, why in REFUSED_VALUES
        if path not in OF_THE_LOOP and read(in_force, path) is bad
    ]
    _raise_if(problems, name)
    return block


def _take_block(deepspeed: dict[str, Any]) -> tuple[list[str], LibraryBlock]:
    """What is wrong with our block, and the block, which is taken out of ``deepspeed``."""
    block = deepspeed.pop("megastab", None) or {}
    if not isinstance(block, dict):
        return [f"megastab = {block!r} must be a section: {{...}}."], LibraryBlock()
    trainers = [key for key in block if key in Megastab.model_fields and key not in LibraryBlock.model_fields]
    problems = [
        f"megastab.{key} is read by the trainer (megastab/pretrain.py) alone; megastab.initialize and attach read megastab.stability and "
        f"megastab.telemetry: leave it out."
        for key in trainers
    ]
    try:
        found = LibraryBlock.model_validate({key: value for key, value in block.items() if key not in trainers})
    except ValidationError as error:
        return problems + explain(error), LibraryBlock()
    if found.stability.qk_clip is not None:
        problems.append(
            "megastab.stability.qk_clip needs attention that tells its largest logits, as the trainer's models do: set it to null."
        )
    return problems + _wrong_looks(found.telemetry), found


def _wrong_looks(telemetry: TelemetryConfig | None) -> list[str]:
    """Looks that only the trainer's models allow, where the JSON asks for them by name."""
    if telemetry is None:
        return []
    asked = [key for key in ("activations", "attention") if key in telemetry.model_fields_set and getattr(telemetry, key)]
    problems = [
        f"megastab.telemetry.{key} = true needs the trainer's models, whose blocks it knows; here weights are looked at: leave it out."
        for key in asked
    ]
    if not telemetry.weights:
        problems.append("megastab.telemetry.weights = false leaves nothing to look at in a foreign model: leave out megastab.telemetry.")
    return problems


def _refused(deepspeed: dict[str, Any], block: Megastab) -> list[str]:
    said = refused({key: value for key, value in deepspeed.items() if key not in OF_THE_LOOP}, block)
    by_path = {sentence.partition(" is refused:")[0]: sentence for sentence in said}
    return [f"{path} is refused: {WAYS_OUT[path]}" if path in WAYS_OUT else sentence for path, sentence in by_path.items()]


def _wrong_optimizer(deepspeed: dict[str, Any]) -> list[str]:
    """A type we do not build is DeepSpeed's to judge."""
    kind = read(deepspeed, "optimizer.type")
    if kind is None:
        return ["there is no optimizer: pass one, or write optimizer.type (AdamW, Adam, SGD, OrthoAdam) and optimizer.params."]
    return wrong_optimizer(deepspeed) if canonical_type(str(kind)) else []


def _raise_if(problems: list[str], name: str) -> None:
    if problems:
        raise UserError("\n  ".join([f"{name} cannot be used:", *problems]))
