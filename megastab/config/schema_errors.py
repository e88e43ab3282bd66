"""Pydantic's complaint about the ``"megastab"`` block, in words: dotted path, value, nearest name or allowed values."""

from __future__ import annotations

import json
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from megastab.config.nearest import did_you_mean
from megastab.config.schema import Megastab


def known_paths(model: type[BaseModel] = Megastab, prefix: str = "megastab") -> dict[str, str]:
    """Dotted path -> description of every key of the block, sections included, in the order of the schema."""
    paths: dict[str, str] = {}
    for name, field in model.model_fields.items():
        path = f"{prefix}.{name}"
        paths[path] = field.description or ""
        section = section_of(field.annotation)
        if section is not None:
            paths.update(known_paths(section, path))
    return paths


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class inside an annotation (``X`` or ``X | None``), or None for a plain value."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and get_origin(candidate) is None and issubclass(candidate, BaseModel):
            return candidate
    return None


def homes() -> dict[str, str]:
    """Last part of a dotted path -> that path: the one nearest to the root, where it is alone there."""
    found: dict[str, list[str]] = {}
    for path in known_paths():
        found.setdefault(path.rsplit(".", 1)[1], []).append(path)
    nearest = {leaf: [p for p in paths if p.count(".") == min(q.count(".") for q in paths)] for leaf, paths in found.items()}
    return {leaf: paths[0] for leaf, paths in nearest.items() if len(paths) == 1}


def explain(error: ValidationError) -> list[str]:
    """One sentence for every wrong key."""
    return [_sentence(part) for part in error.errors()]


def _sentence(part: Any) -> str:
    path = ".".join(["megastab", *map(str, part["loc"])])
    kind, value = part["type"], part.get("input")
    if kind == "extra_forbidden":
        return f"{path} is not a known key.{_nearest_key(part['loc'])}"
    if kind == "missing":
        return f"{path} is missing: {known_paths().get(path, '')}"
    if kind == "value_error":  # a rule between keys of one section, whose sentence names them
        return f"{path}: {part['ctx']['error']}."
    if kind == "literal_error":
        return f"{path} = {_shown(value)} must be {part['ctx']['expected']}."
    return f"{path} = {_shown(value)} is wrong: {part['msg'][:1].lower()}{part['msg'][1:]}."


# Names people bring from elsewhere, and where the fact lives here.
HOMES_ELSEWHERE = {"max_grad_norm": " Its home is the top-level gradient_clipping, which is ZClip's cap where zclip is on."}


def _nearest_key(loc: tuple[int | str, ...]) -> str:
    if loc[-1] in HOMES_ELSEWHERE:
        return HOMES_ELSEWHERE[str(loc[-1])]
    model: type[BaseModel] | None = Megastab
    for step in loc[:-1]:
        field = model.model_fields.get(str(step)) if model is not None else None
        model = section_of(field.annotation) if field is not None else None
    prefix = ".".join(["megastab", *map(str, loc[:-1]), ""])
    return did_you_mean(str(loc[-1]), model.model_fields if model is not None else (), homes(), prefix)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
