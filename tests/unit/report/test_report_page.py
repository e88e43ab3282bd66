from __future__ import annotations

import base64
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megastab.config.errors import UserError
from megastab.report.incident_table import SHOWN
from megastab.report.page import write_page
from megastab.report.what_ran import what_ran
from megastab.stability.record import Event
from tests.unit.report.conftest import CONFIG, RunMaker

ROOT = Path(__file__).parents[3]
VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Checks that tags nest; keeps what a person reads, the cells of tables, and whatever would be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.loaded: list[str] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.loaded += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text())
    reader.close()
    assert reader.open == []
    return reader


def row_of(page: Reader, step: int) -> list[str]:
    return next(row for row in page.rows if row[0] == str(step) and len(row) == 9)


def test_the_page_stands_alone(spiky_run: Path, tmp_path: Path) -> None:
    page = read(write_page(spiky_run, tmp_path / "new" / "page.html"))
    assert {"html", "head", "title", "body", "img", "table"} <= page.seen
    assert not {"script", "link", "iframe", "a"} & page.seen
    (image,) = page.loaded
    assert base64.b64decode(image.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    source = (tmp_path / "new" / "page.html").read_text()
    assert "url(" not in source and "@import" not in source and "http" not in source


def test_a_picture_drawn_before_is_taken(run: RunMaker, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"picture")
    path = run()
    assert write_page(path, picture=tmp_path / "a.png") == path / "report.html"
    assert read(path / "report.html").loaded == ["data:image/png;base64," + base64.b64encode(b"picture").decode()]


def test_a_spike_is_told_with_its_cause_and_its_effect(spiky_run: Path, tmp_path: Path) -> None:
    page = read(write_page(spiky_run, tmp_path / "page.html"))
    steps = [int(row[0]) for row in page.rows if len(row) == 9 and row[0].isdigit()]
    assert steps[0] == 450 and set(steps[1:3]) == {300, 301}  # not finite; then the spike, and the loss after it
    step, what, norm, z, threshold, done, top, samples, losses = row_of(page, 300)
    assert what.startswith("clippedz ") and "is above 2.5" in what
    assert norm == "9" and float(z) > 50 and 0.7 < float(threshold) < 1.2
    assert done.startswith("gradients times 0.") and f"to a norm of {threshold}" in done
    assert top.startswith("layers.3.q81.0 %layers.0.q5.0 %")
    assert samples == "2392 to 2399"
    assert re.fullmatch(r"2\.\d+ \u2192 2\.\d+ \u2192 3\.\d+rose by 1\.\d+ \(\d+ sd\)", losses), losses
    assert row_of(page, 420)[8].endswith("did not react")
    _, what, norm, z, _, done, top, _, _ = row_of(page, 450)
    assert what.startswith("not finite, skipped") and (norm, z) == ("not finite", "\u2013")
    assert done.startswith("no update") and top.startswith("layers.3.q not finitelayers.0.q5.0 %")
    assert "was most often that of layers.3.q" in page.text


def test_everything_else_is_told_too(spiky_run: Path, tmp_path: Path) -> None:
    page = read(write_page(spiky_run, tmp_path / "page.html"))
    assert "spiky: 600 steps, 2.46 M tokens" in page.text
    assert "1 step was not finite, 1 step was skipped, 1 loss spike," in page.text and "15 rescales of matrices, 1 warning." in page.text
    assert "LLaMA of 5.31 M parameters" in page.text
    assert "step 452: warning the loss scale <is> at its floor & stays" in page.text
    assert "6 checkpoints written, the last at step 600." in page.text
    scores = {row[0]: row[1:] for row in page.rows}
    assert scores["loss"] == ["0 %", "300"]  # the fall of the first 300 losses is in the window and hides the spike; the page says so
    assert scores["gradient norm"] == ["0.664 %", "299"]  # 300 and inf of 301; 420 has the deviation of 300 in its window
    assert scores["layers.0.up"] == ["9", "200 to 600", "0.8333"] and scores["layers.2.up"] == ["1", "600 to 600", "0.625"]
    assert "15 rescales of 3 matrices; the smallest factor was 0.625, for layers.2.up." in page.text
    assert scores["500"][0] == "2.107 lowest" and "lowest" not in scores["600"][0]
    assert "ZClip (alpha 0.97, z_thresh 2.5)" in page.text and "fixed cap" not in page.text
    assert (
        "8.192k tokens/s, 0.5 s a step (slowest 0.5 s), 0.02 TFLOP/s a rank, 0.2 % of the time fetching data, peak memory 0.6 GB"
        in page.text
    )


def test_a_quiet_run_is_one_sentence(run: RunMaker) -> None:
    page = read(write_page(run({3: {"action": "clip"}}, events=(Event(40, "save", "x"), Event(20, "resume", "from there")))))
    said = "Nothing happened: every step was applied, and no spike, rescale, rewind or warning was logged."
    assert f"{said} The fixed cap scaled the gradients of 1 step (2.5 % of them)." in page.text
    assert "Worst first" not in page.text
    assert "step 20: resume from there" in page.text


def test_a_long_list_is_cut_and_says_so(run: RunMaker) -> None:
    page = read(write_page(run({step: {"action": "clip", "z": 3.0 + step} for step in range(1, 41)})))
    shown = [int(row[0]) for row in page.rows if len(row) == 9 and row[0].isdigit()]
    assert shown == list(range(40, 40 - SHOWN, -1))
    assert f"and {40 - SHOWN} more" in page.text


def test_an_overflow_is_no_catastrophe(run: RunMaker) -> None:
    changes = {s: {"action": "skip", "grad_norm": math.inf, "reason": "overflow: the fp16 loss scale falls"} for s in (1, 250)}
    path = write_page(run(changes, num_steps=300))
    page = read(path)
    assert "Of 300 steps: 2 steps were skipped while the fp16 loss scale fell." in page.text
    assert "not finite, skipped" in page.text and 'class="bad">not finite, skipped' not in path.read_text()
    assert {row[0]: row[1:] for row in page.rows}["gradient norm"] == ["0 %", "149"]


def test_what_is_logged_is_text_and_not_markup(run: RunMaker) -> None:
    evil = "<script>alert(1)</script>&\"'"
    facts = {"top": [{"name": evil, "share": 0.5}], "samples": [0, 7]}
    events = (Event(5, "skip", evil, facts), Event(6, "rescale", "", {"name": evil, "std": 2.0, "target": 1.0}), Event(7, evil, evil))
    path = run({5: {"action": "skip"}}, events=events, name="<b>$run$")
    config = json.loads(CONFIG.read_text())
    config["megastab"]["data"]["train"] = [[1.0, evil]]
    (path / "config.json").write_text(json.dumps(config))
    page = read(write_page(path))
    assert "script" not in page.seen
    assert page.text.count(evil) == 7  # data, reason, parameter, matrix (in words and table), kind and reason of the event nobody knows
    assert "<b>$run$: 40 steps" in page.text


def test_an_old_or_broken_folder_still_gives_a_page(run: RunMaker) -> None:
    changes = {5: {"action": "skip", "grad_norm": math.inf, "loss": math.nan, "reason": "the gradient norm is not finite"}}
    path = run(changes, events=(Event(5, "skip", "the gradient norm is not finite; norm inf, samples 32 to 39"),))
    (path / "config.json").write_text('{"train_batch_si')
    with open(path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 41, "loss": "high", "grad_norm": {}, "lr": NaN, "tokens": "x", "seconds": null}\n')
        file.write(b'{"step": 42, "loss": Infinity, "grad_norm": 1' + b"0" * 400 + b'}\n\xff\xfe\n[1]\n{"step": 43, "lo')
    with open(path / "events.jsonl", "a") as file:
        file.write('{"step": 41, "kind": ["odd"], "reason": 3}\n{"step": 42}\n{"step": 42, "kind": "warning", "reason": "\\ud800"}\n{"st')
    page = read(write_page(path))
    assert "has no readable config.json" in page.text and "samples 32 to 39" in row_of(page, 5)[1]
    assert [row_of(page, step)[2] for step in (5, 41, 42)] == ["not finite"] * 3
    assert "run: 42 steps, 0.04 M tokens, loss 8.000 -> 0.200 (lowest 0.200)" in page.text


def test_a_run_where_nothing_was_finite_has_a_page(run: RunMaker) -> None:
    nothing = {step: {"loss": math.nan, "grad_norm": math.inf, "action": "skip", "clip_threshold": None} for step in range(1, 41)}
    page = read(write_page(run(nothing, {40: math.nan})))
    assert "40 steps were not finite, 40 steps were skipped" in page.text and "no finite loss" in page.text


def test_a_folder_without_steps_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no step"):
        write_page(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_config_is_put_in_words() -> None:
    config = json.loads(CONFIG.read_text())
    config |= {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    config["megastab"]["stability"] = {
        "zclip": {"alpha": 0.97, "compat": False, "max_nonfinite_in_a_row": None},
        "tvr": {"target_std": 0.01},
    }
    said = dict(what_ran(config))
    assert said["Model"] == (
        "LLaMA of 5.31 M parameters, 4 layers of width 256, 4 heads, sequences of 256 tokens, vocabulary 4096, "
        "init scheme residual_scaled, std 0.02"
    )
    assert said["Layout"] == "tensor 2 x pipeline 1 x data 2"
    assert said["Batch"] == "8 samples (micro-batches of 2, 2 a step and rank), 2048 tokens a step"
    assert said["Precision"] == "bf16, ZeRO 1"
    assert said["Optimizer"] == "AdamW: lr 0.002, betas 0.9 0.95, eps 1e-08, weight_decay 0.1"
    assert said["Clipping"] == "ZClip (alpha 0.97), fixed cap 1" and said["TVR"] == "target_std 0.01"
    assert said["Data"] == "data/quickstart_train" and said["Seed"] == "1234"
    config["megastab"]["parallel"]["context"] = 2
    assert dict(what_ran(config))["Layout"] == "tensor 2 x pipeline 1 x context 2 x data 2"


def test_a_config_of_another_version_says_what_it_can() -> None:
    model = {"arch": "mamba", "num_layers": 2, "unheard_of": 1}
    said = dict(what_ran({"gradient_clipping": 0.0, "megastab": {"model": model, "parallel": [], "stability": 3, "data": {"train": "x"}}}))
    assert said["Model"].startswith("mamba, 2 layers of width None")
    assert (said["Clipping"], said["Precision"]) == ("none", "fp32, ZeRO 0")
    assert what_ran({}) == []


def test_the_command_writes_both(run: RunMaker, tmp_path: Path) -> None:
    path = run()
    line = [sys.executable, "tools/report.py", str(path), "--output", str(tmp_path / "p.png"), "--page", str(tmp_path / "q.html")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [str(tmp_path / "p.png"), str(tmp_path / "q.html")]
    assert (tmp_path / "p.png").is_file() and (tmp_path / "q.html").is_file() and not (path / "report.html").exists()


def test_a_place_that_cannot_be_written_is_one_error(run: RunMaker) -> None:
    path = run()
    line = [sys.executable, "tools/report.py", str(path), "--page", str(path / "metrics.jsonl" / "page.html")]
    failed = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert failed.returncode == 1 and failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr
    assert "metrics.jsonl" in failed.stderr


def test_a_page_imports_no_torch() -> None:
    code = "import sys, megastab.report.page; assert not {'torch', 'deepspeed', 'matplotlib'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_a_rewind_is_told_with_what_it_undid_and_left_out(run: RunMaker, tmp_path: Path) -> None:
    skip = {"samples": [40, 60], "left_out": [[44, 50]]}
    events = (Event(9, "loss_spike", "out", {"undone": True}), Event(10, "rewind", "8 bad steps: went back"), Event(12, "skip", "x", skip))
    page = read(write_page(run({12: {"action": "skip"}}, events=events), tmp_path / "page.html"))
    assert "1 rewind" in page.text and "step 10: rewind 8 bad steps: went back" in page.text
    assert "Of steps that were taken back and taken again: 1 loss spike" in page.text
    assert row_of(page, 12)[7] == "40 to 60without 44 to 50"
