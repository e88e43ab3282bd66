"""A run as one HTML page that needs nothing else: no file beside it, no network, no script.

What it holds, in order: one headline, what ran, the curves, what happened (worst first) and who carried it, spike scores, the look inside
the model, rescales, warnings and resumes, evaluations, speed, the ranks. It is read from the run folder's log files alone; facts an older
folder lacks are left out.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from megastab.report import page_sections
from megastab.report.curves import figure_of
from megastab.report.history import History, read_history, read_run_config
from megastab.report.incident_table import what_happened
from megastab.report.incidents import incidents_of
from megastab.report.inside import inside
from megastab.report.markup import STYLE, note, section, text
from megastab.report.ranks import ranks

PICTURE = (
    "Clipped and skipped steps, loss spikes and rescales are marked where they happened; a triangle at the top is a value that was not "
    "finite; the numbers in the middle panel are the steps of the worst rows below."
)


def write_page(run_folder: str | Path, out_html: str | Path | None = None, picture: str | Path | None = None) -> Path:
    """Write a run's page; returns its path, ``report.html`` in the run folder unless told otherwise.

    Args:
        run_folder: where the run logged.
        out_html: where to.
        picture: the PNG ``draw_curves`` made of the same run; drawn anew when not given.

    Raises:
        UserError: the folder holds no steps, or cannot be read.
    """
    history = read_history(run_folder)
    png = _drawn(history) if picture is None else Path(picture).read_bytes()
    out = Path(run_folder) / "report.html" if out_html is None else Path(out_html)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page_of(history, read_run_config(run_folder), png), encoding="utf-8", errors="replace")
    return out


def page_of(history: History, config: dict[str, Any], png: bytes) -> str:
    """The page, not yet a file."""
    incidents, name = incidents_of(history), text(history.name)
    image = f'<img alt="loss, gradient norm and learning rate over the steps" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    sections = [
        page_sections.ran(config),
        section("Curves", image, note(PICTURE)),
        what_happened(history, incidents),
        page_sections.scores(history, incidents),
        inside(history),
        page_sections.rescales(history),
        page_sections.turns(history, incidents),
        page_sections.evaluations(history),
        page_sections.speed(history),
        ranks(history),
    ]
    body = "\n".join(part for part in sections if part)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: report of a run</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{name}</h1>
<p class="headline">{text(history.summary())}</p>
</header>
{body}
</body>
</html>
"""


def _drawn(history: History) -> bytes:
    held = io.BytesIO()
    figure_of(history).savefig(held)
    return held.getvalue()
