"""Take the figures asked for, and print and write them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from megastab.report.bench.attention import attention
from megastab.report.bench.cases import Options
from megastab.report.bench.corpus import data
from megastab.report.bench.jobs import Failed
from megastab.report.bench.machine import facts
from megastab.report.bench.norms import norms
from megastab.report.bench.offload import offload
from megastab.report.bench.ortho_step import ortho_step
from megastab.report.bench.orthoadam import orthoadam
from megastab.report.bench.recompute import recompute
from megastab.report.bench.rows import Row, table
from megastab.report.bench.speed import memory, single, tp2, trainer, wrappers
from megastab.report.bench.stability import stability
from megastab.report.bench.start import start

FIGURES: dict[str, Callable[[Options], Iterator[Row]]] = {
    "single": single,
    "memory": memory,
    "trainer": trainer,
    "tp2": tp2,
    "start": start,
    "data": data,
    "wrappers": wrappers,
    "stability": stability,
    "orthoadam": orthoadam,
    "ortho_step": ortho_step,
    "attention": attention,
    "norms": norms,
    "offload": offload,
    "recompute": recompute,
}


def run(names: Sequence[str], options: Options, json_path: Path | None = None) -> list[Row]:
    """Measure ``names`` in order and print the table; a figure that fails is a row that says why."""
    machine = facts(options.threads)
    rows = []
    for name in names:
        for row in _measured(name, options):
            print("  ".join(row.cells()), file=sys.stderr, flush=True)
            rows.append(row)
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    if options.is_quick:
        print("quick: few rounds, model A only; these figures decide nothing")
    print(table(rows))
    if json_path is not None:
        json_path.write_text(json.dumps({"machine": machine, "rows": [{**asdict(r), "verdict": r.verdict} for r in rows]}, indent=1) + "\n")
    return rows


def _measured(name: str, options: Options) -> Iterator[Row]:
    try:
        yield from FIGURES[name](options)
    except Failed as error:
        yield Row(name, "", None, detail=str(error))
