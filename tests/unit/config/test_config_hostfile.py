"""A hostfile is read before anything starts, and every line of it that cannot be used is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from megastab.config.errors import UserError
from megastab.config.hostfile import host_of, main, read_hostfile


def test_comments_spaces_windows_ends_and_a_missing_last_newline_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(b"# racks\r\n\r\nuser@a slots=2   \r\n10.0.0.2\tslots=4 max_slots=8 # new\r\nc.d-e slots=1")
    assert read_hostfile(path) == {"user@a": 2, "10.0.0.2": 4, "c.d-e": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no host"),
        ("# a slots=2\n", "names no host"),
        ("a\n", "line 1, 'a': must be 'NAME slots=RANKS'"),
        ("a:2\n", "line 1"),
        ("a,b slots=2\n", "line 1"),
        ("\ufeffa slots=2\n", "line 1"),
        ("a slots=0\n", "slots = '0'"),
        ("a slots=2x\n", "slots = '2x'"),
        ("a slots=-1\n", "slots = '-1'"),
        ("a slots=\n", "slots = ''"),
        ("a slots=2\nb slots=1\na slots=2\n", "line 3, 'a slots=2': a was named before"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UserError) as told:
        read_hostfile(path)
    assert str(path) in str(told.value) and said in str(told.value)


def test_all_wrong_lines_at_once_and_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("a\nb slots=1\nc slots=x\n")
    with pytest.raises(UserError, match=r"(?s)line 1, .*line 3, "):
        read_hostfile(path)
    for wrong, said in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file"), (tmp_path / "bytes", "not text")):
        (tmp_path / "bytes").write_bytes(b"\xff\xfe")
        with pytest.raises(UserError, match=said):
            read_hostfile(wrong)


@pytest.mark.parametrize(("node", "code"), [("", 0), ("1", 0), ("2", 2), ("-1", 2), ("x", 2)])
def test_the_command_that_multi_node_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], node: str, code: int
) -> None:
    monkeypatch.setenv("NODE_RANK", node)
    path = tmp_path / "hosts"
    path.write_text("a slots=2\nb slots=1\n")
    assert main([str(path)]) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("a:2,b:1\n", "") if code == 0 else out == "" and f"NODE_RANK = '{node}'" in err and "0 to 1" in err


def test_the_host_of_a_rank() -> None:
    assert [host_of(rank, "a:2,b:1") for rank in range(4)] == ["a", "a", "b", None]
    assert host_of(0, "") is None
