"""Input files for tests."""

from __future__ import annotations

import json
from pathlib import Path


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path
