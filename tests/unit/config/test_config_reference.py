from __future__ import annotations

from pathlib import Path

import pytest

from megastab.config.complete import TRAPS
from megastab.config.reference import main, render
from megastab.config.schema import Megastab
from megastab.config.schema_errors import known_paths, section_of

PAGE = Path(__file__).parents[3] / "docs" / "config.md"


def test_committed_page_is_current() -> None:
    assert PAGE.read_text() == render(), "run: python -m megastab.config.reference --write docs/config.md"


def test_page_names_every_key_of_ours_and_every_completion() -> None:
    page = render()
    for path in known_paths():
        assert f"`{path}`" in page, path
    for trap in TRAPS:
        assert f"| `{trap.key}` | {trap.condition} | {trap.reason} |" in page


@pytest.mark.parametrize(
    "row",
    [
        '| `megastab.model.arch` | `"gpt"` \\| `"llama"` | required |',
        "| `megastab.model.activation_topk` | number > 0, <= 1 | `0.1` |",
        "| `megastab.data.train` | list of [number > 0, string] | `[]` |",
        "| `megastab.run.keep_last` | integer > 0 or null | `null` |",
        "| `megastab.run.compile` | boolean | `false` |",
    ],
)
def test_row_tells_type_bounds_and_default(row: str) -> None:
    assert row in render()


def test_every_field_and_section_has_a_docstring() -> None:
    assert [path for path, text in known_paths().items() if not text] == []
    for name, field in Megastab.model_fields.items():
        section = section_of(field.annotation)
        assert section is not None and section.__doc__, name


def test_write_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--write", str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text() == render()
    assert capsys.readouterr().out == ""
    main([])
    assert capsys.readouterr().out == render()
