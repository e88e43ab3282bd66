"""The few pieces of HTML the page is made of. ``text`` makes a logged string safe; everything else takes and gives HTML."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #57606a; --line: #d8dee4; --shade: #f6f8fa;
  --bad: #b2182b; --warn: #b35900; --bar: #4c78a8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0f1318; --soft: #9aa5b1; --line: #303842; --shade: #181e25;
  --bad: #ff8a80; --warn: #ffb454; --bar: #79a9dc; } }
body { color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.headline { font-size: 1.05rem; margin: .2rem 0 0; } .note, small { color: var(--soft); } .note { font-size: .9rem; max-width: 60rem; }
img { display: block; width: 100%; max-width: 75rem; background: #fff; border-radius: 6px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; }
th { text-align: left; font-weight: 600; background: var(--shade); } th, td { padding: .35rem .7rem .35rem .4rem; vertical-align: top;
  border-bottom: 1px solid var(--line); } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; } dt { color: var(--soft); } dd { margin: 0; }
.bad { color: var(--bad); font-weight: 600; } .warn { color: var(--warn); font-weight: 600; } small { display: block; }
.share, .line { white-space: nowrap; } .share span { display: inline-block; min-width: 3.6rem; } .share .who { min-width: 10rem; }
.share .track { background: var(--line); width: 5rem; height: .55rem; margin: 0 .5rem; }
.track i { display: block; height: 100%; background: var(--bar); }
@media print { :root { --ink: #000; --paper: #fff; --soft: #444; --line: #bbb; --shade: #eee; --bad: #900; --warn: #840; --bar: #4c78a8; }
  body { margin: 0; max-width: none; font-size: 10pt; } table { font-size: 7.5pt; } tr, img { break-inside: avoid; }
  .wide { overflow: visible; } * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def text(value: object) -> str:
    """Anything from a log or a name, escaped."""
    return html.escape(str(value))


def figure(value: float | None, missing: str = "&ndash;") -> str:
    """A number with four digits; ``missing`` where there is none."""
    return missing if value is None or math.isnan(value) else f"{value:.4g}"


def picture_tag(picture: Figure, words: str) -> str:
    """A drawing inside the page; ``words`` say what it shows."""
    held = io.BytesIO()
    picture.savefig(held)
    return f'<img alt="{text(words)}" src="data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}">\n'


def section(title: str, *parts: str) -> str:
    """A heading over what is not empty; nothing when all of it is."""
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>" if body else ""


def note(words: str) -> str:
    """A remark in small print."""
    return f'<p class="note">{words}</p>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str] = ()) -> str:
    """Cells under column names; the columns in ``numbers`` stand right."""
    styles = [' class="n"' if name in numbers else "" for name in head]
    top = "".join(f'<th scope="col"{style}>{name}</th>' for name, style in zip(head, styles, strict=True))
    lines = ["".join(f"<td{style}>{cell}</td>" for cell, style in zip(row, styles, strict=True)) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Names and what they stand for."""
    return "<dl>\n" + "\n".join(f"<dt>{name}</dt><dd>{words}</dd>" for name, words in rows) + "\n</dl>"


def bullets(lines: Sequence[str]) -> str:
    """A list; nothing for no lines."""
    return "<ul>\n" + "\n".join(f"<li>{line}</li>" for line in lines) + "\n</ul>" if lines else ""


def share_bar(name: str, share: float) -> str:
    """A named bar from 0 to 1; a share that is not known is said to be not finite."""
    if math.isnan(share):
        return f'<div class="share"><span class="who">{text(name)}</span> <span class="bad">not finite</span></div>'
    width = 100 * min(max(share, 0.0), 1.0)
    track = f'<span class="track"><i style="width:{width:.1f}%"></i></span>'
    return f'<div class="share"><span class="who">{text(name)}</span>{track}<span>{100 * share:.1f} %</span></div>'


def counted(count: int, one: str, many: str = "") -> str:
    """``1 step``, ``3 steps``."""
    return f"{count} {one if count == 1 else many or one + 's'}"
