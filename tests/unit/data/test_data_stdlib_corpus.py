"""The corpus that is on every machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from megastab.data.stdlib_corpus import documents, modules


def test_command_writes_modules_and_topics_in_a_fixed_order(tmp_path: Path) -> None:
    out = tmp_path / "made" / "corpus.jsonl"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-m", "megastab.data.stdlib_corpus", str(out)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    names = [record["name"] for record in records]
    assert done.stdout.startswith(f"{out}: {len(records)} documents, ")
    assert [(record["name"], record["text"]) for record in records] == list(documents())
    assert {"argparse.py", "json/decoder.py", "topic/if"} <= set(names)
    assert len(names) == len(set(names)) > 300
    assert sum(len(record["text"]) for record in records) > 5_000_000
    assert not any("site-packages" in name or "/test/" in name for name in names)


def test_undecodable_empty_and_foreign_modules_are_left_out(tmp_path: Path) -> None:
    for folder in ("site-packages/x", "test", "pkg/tests", "pkg"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "m.py").write_text("x = 1\n")
    (tmp_path / "a.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "b.py").write_text("\n")
    (tmp_path / "c.txt").write_text("no module")
    assert list(modules(tmp_path)) == [("pkg/m.py", "x = 1\n")]
