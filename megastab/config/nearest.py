"""What a misspelt name was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


def did_you_mean(name: str, here: Iterable[str], elsewhere: Mapping[str, str] | None = None, prefix: str = "") -> str:
    """`` Did you mean ...?`` or nothing: the same name elsewhere beats a similar one here.

    ``elsewhere`` maps the last part of every known dotted path to that path; ``prefix`` is the section of ``here``.
    """
    moved = (elsewhere or {}).get(name)
    if moved is not None:
        return f" Did you mean {moved}?"
    close = difflib.get_close_matches(name.lower(), list(here), n=1, cutoff=0.6)
    return f" Did you mean {prefix}{close[0]}?" if close else ""
