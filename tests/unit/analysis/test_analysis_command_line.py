"""Every analysis once through tools/analyze.py: files, pictures, what is printed; and what a mistake says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megastab.analysis.command_line import analyses, parser_of
from megastab.analysis.output import Output, Table, markdown, plain, shown
from megastab.config.errors import UserError
from megastab.data.tokenizer import Tokenizer
from tests.unit.analysis import planted
from tests.unit.analysis.models import VOCAB, save_foreign, save_own
from tests.unit.analysis.test_analysis_massive import theirs

ROOT = Path(__file__).parents[3]
PICTURES = {
    "existence": [],
    "top": ["top_layers", "top_magnitudes"],
    "kurtosis": ["kurtosis"],
    "first-token": [],
    "attention": ["attention_with_bos", "attention_without_bos", "attention_heads"],
    "intervene": [],
}


def test_every_page_of_help_can_be_printed() -> None:
    whole = parser_of("what it is").format_help()
    for analysis in analyses():
        assert analysis.help.split()[0] in whole and analysis.name in whole
        with pytest.raises(SystemExit, match="0"):
            parser_of(None).parse_args([analysis.name, "--help"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of the planted model in ``planted`` and a text it knows in ``text.txt``."""
    out = tmp_path_factory.mktemp("analyze")
    save_foreign(out / "planted", model=theirs(1).model)
    (out / "text.txt").write_text("".join(chr(32 + token - 3) for token in planted.cycle(VOCAB, 600)))
    return out


def analyze(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """The tool in this process: its imports are paid for."""
    sys.path.insert(0, str(ROOT / "tools"))
    import analyze as tool

    monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, arguments)])
    try:
        tool.main()
    finally:
        sys.path.remove(str(ROOT / "tools"))


@pytest.mark.parametrize("name", PICTURES)
def test_each_analysis_writes_what_it_found(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ["--text", folder / "text.txt", "--windows", 3, "--seq-len", 20, "--output", tmp_path, "--batch", 2]
    analyze(monkeypatch, name, folder / "planted", *text, *(["--calibration", 2] if name == "intervene" else []))
    written = name.replace("-", "_")
    data = json.loads((tmp_path / f"{written}.json").read_text())
    assert data["model"] == "planted" and {"with BOS", "without BOS"} <= set(data)
    printed = capsys.readouterr().out
    assert (tmp_path / f"{written}.md").read_text().strip() in printed
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == sorted(PICTURES[name])
    assert all(path.stat().st_size > 5000 for path in tmp_path.glob("*.png"))
    check = CHECKS[name]
    check(data["with BOS"], data["without BOS"])


def check_existence(bos: Any, without: Any) -> None:
    assert bos["verdict"]["channels"] == "13" and bos["verdict"]["at the first position"] == "BOS '<s>'"
    assert [layer["massive"] for layer in bos["layers"]] == [False, True, True]
    assert without["verdict"]["massive activations"] is False


def check_top(bos: Any, without: Any) -> None:
    assert bos[1]["top"][0] == pytest.approx(5000, rel=1e-3) and bos[0]["top"][0] < 10 and without[1]["top"][0] < 10


def check_kurtosis(bos: Any, without: Any) -> None:
    assert bos["layers"][1]["kurtosis_first"] == pytest.approx(30 + 1 / 31, rel=1e-4) and len(bos["kurtosis_by_position"]) == 20


def check_first_token(bos: Any, without: Any) -> None:
    assert bos["by_layer_and_head"]["mass"][2] == pytest.approx([1.0] * 4) and bos["share"] == pytest.approx(1 / 3)
    assert without["excess"] == pytest.approx(0.0, abs=1e-6)


def check_attention(bos: Any, without: Any) -> None:
    assert bos["heads"][-1]["most_attended"][0] == {"position": 0, "share": pytest.approx(1.0)}


def check_intervene(bos: Any, without: Any) -> None:
    zero, mean = (effect["perplexity"] for effect in bos["effects"])
    assert bos["layer"] == 1 and zero > 1000 * bos["perplexity"] and mean == pytest.approx(bos["perplexity"], rel=1e-5)
    assert without["layer"] is None and without["effects"] == []


CHECKS = {
    "existence": check_existence,
    "top": check_top,
    "kurtosis": check_kurtosis,
    "first-token": check_first_token,
    "attention": check_attention,
    "intervene": check_intervene,
}


def test_a_run_of_ours_is_analysed_by_the_command(tmp_path: Path, text_data: Path) -> None:
    run = save_own(tmp_path / "mine", Tokenizer(text_data / "tok.model"), vocab_size=512)
    command = [sys.executable, str(ROOT / "tools" / "analyze.py"), "existence", str(run), "--text", str(text_data / "text_valid")]
    done = subprocess.run([*command, "--windows", "2", "--bos", "with"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "mine/step00000003: massive activations" in done.stdout and "with BOS:   0%" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["existence", "planted", "--text", "text.txt", "--seq-len", "99"], "--seq-len 99 is more than the 48 positions"),
        (["existence", "planted", "--text", "text.txt", "--windows", "999"], "lower --seq-len or --windows"),
        (["existence", "nowhere", "--text", "text.txt"], "no folder nowhere"),
        (["top", "planted", "--text", "text.txt", "--layer", "3"], "--layer 3: the model has layers 0 to 2"),
        (["attention", "planted", "--text", "text.txt", "--layers", "1", "-1"], "--layers -1: the model has layers 0 to 2"),
        (["existence", "planted", "--text", "text.txt", "--blocks", "layers"], "--blocks layers: no list of modules of that name"),
        (["existence", "planted", "--text", "text.txt", "--output", "text.txt"], "text.txt: .*another folder"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    arguments += [] if "--seq-len" in arguments else ["--seq-len", "20"]
    with pytest.raises(SystemExit) as stopped:
        analyze(monkeypatch, *arguments)
    message = str(stopped.value)
    assert message.count("error: ") == 1 and "\n" not in message and re.search(said, message), message


def test_names_of_analyses_are_told_apart() -> None:
    names = [analysis.name for analysis in analyses()]
    assert len(set(names)) == len(names) and set(PICTURES) <= set(names)


def test_what_is_not_finite_is_null_in_json_and_a_word_in_tables(tmp_path: Path) -> None:
    Output(tmp_path).write(
        "some", {"a": float("nan"), "b": [float("inf"), (1, 2.5)]}, [Table("t", ["x", "y"], [[float("nan"), float("inf")]])]
    )
    assert json.loads((tmp_path / "some.json").read_text()) == {"a": None, "b": [None, [1, 2.5]]}
    assert markdown(Table("t", ["x", "y"], [[None, float("inf")]])).splitlines()[-1] == "| -   | inf |"
    assert [shown(value) for value in (True, 0.123456, 12345.6, 1e9, "a|b\nc")] == ["yes", "0.1235", "12346", "1e+09", "a\\|b c"]
    assert plain({1: True}) == {"1": True}


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="give another folder"):
        Output(tmp_path / "file" / "below").write("some", {}, [])
