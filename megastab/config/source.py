"""The JSON as written: read a file, refuse what JSON parsers let pass, apply dotted overrides."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megastab.config.errors import UserError


def read_source(source: str | Path | dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The config as a private dict, and the name to call it by in messages."""
    if isinstance(source, dict):
        return copy.deepcopy(source), "the config"
    name = str(source)
    try:
        text = Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the config file {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"the config file {name} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    return parse_json(text, name), name


def apply_overrides(config: dict[str, Any], overrides: Sequence[str]) -> None:
    """Write every ``a.b.c=value`` into ``config``; the names are checked afterwards, with those of the file."""
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise UserError(f"cannot read the override {override!r}: write section.key=value, e.g. megastab.run.total_steps=20")
        _place(config, keys, _value(text), override)


def parse_json(text: str, name: str) -> dict[str, Any]:
    """One JSON object that says nothing twice; an error that calls it ``name``."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        section = dict(pairs)
        if len(section) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            raise UserError(f"{name} says {', '.join(map(repr, twice))} twice in one section: keep one")
        return section

    try:
        config = json.loads(text, object_pairs_hook=unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is not valid JSON, line {error.lineno} column {error.colno}: {error.msg}") from None
    if not isinstance(config, dict):
        raise UserError(f"{name} must hold one JSON object {{...}}, not a {type(config).__name__}")
    return config


def _refuse_constant(constant: str) -> float:
    raise UserError(f"{constant} is given, which is not JSON: write a finite number or null")


def _value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError:
        return text  # a plain word or a path needs no quotes


def _place(config: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    section = config
    for depth, key in enumerate(keys[:-1], start=1):
        if section.get(key) is None:
            section[key] = {}  # null switches a section off; an override inside it switches it on
        if not isinstance(section[key], dict):
            path = ".".join(keys[:depth])
            raise UserError(f"cannot apply the override {override!r}: {path} = {json.dumps(section[key])} is not a section")
        section = section[key]
    section[keys[-1]] = value
