"""Real text that is on every machine: the sources of the Python standard library and the topics of its manual.

``python -m megastab.data.stdlib_corpus OUT.jsonl`` writes one document per module and per topic, in a fixed order. Tests, fixtures
and installed packages are left out because whether they are there differs from machine to machine.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "lib2to3", "__pycache__"}


def modules(root: Path) -> Iterator[tuple[str, str]]:
    """(relative path, source) of every module below ``root`` that decodes as UTF-8, sorted by path."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _SKIPPED.intersection(name.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            yield name.as_posix(), text


def documents() -> Iterator[tuple[str, str]]:
    """(name, text) of every module of the standard library, then of every topic of ``pydoc``."""
    from pydoc_data.topics import topics

    yield from modules(Path(sysconfig.get_paths()["stdlib"]))
    yield from ((f"topic/{name}", text) for name, text in sorted(topics.items()))


def write_corpus(out: Path) -> tuple[int, int]:
    """Write the corpus as JSONL; returns the number of documents and of bytes of text."""
    out.parent.mkdir(parents=True, exist_ok=True)
    num_documents = num_bytes = 0
    with open(out, "w", encoding="utf-8", newline="\n") as stream:
        for name, text in documents():
            stream.write(json.dumps({"name": name, "text": text}) + "\n")
            num_documents += 1
            num_bytes += len(text.encode())
    return num_documents, num_bytes


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=write_corpus.__doc__, prog="python -m megastab.data.stdlib_corpus")
    parser.add_argument("out", type=Path, metavar="OUT.jsonl", help="file to write")
    arguments = parser.parse_args()
    num_documents, num_bytes = write_corpus(arguments.out)
    print(f"{arguments.out}: {num_documents} documents, {num_bytes / 1e6:.1f} MB of text")


if __name__ == "__main__":
    main()
