"""Does a model have massive activations, and where (arXiv 2402.17762; 2503.22329, section 3)."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from megastab.analysis import arguments as shared
from megastab.analysis.output import Table
from megastab.analysis.perplexity import batches
from megastab.analysis.subject import Subject
from megastab.config.errors import UserError
from megastab.telemetry.moments import TOP, Entry, Sketch, Summary, sketch, summary


class StreamWatch:
    """Sums over all windows of what the residual stream is after each block; no activation is kept."""

    def __init__(self, num_layers: int):
        self.sums: list[Tensor | None] = [None] * num_layers
        self.entries: list[list[Entry]] = [[] for _ in range(num_layers)]
        self.window_BS = torch.empty(0, 0, dtype=torch.int64)
        self.first_window = 0

    def see(self, layer: int, hidden_BSD: Tensor) -> None:
        """One layer of one forward pass."""
        found = sketch(hidden_BSD.reshape(-1, hidden_BSD.shape[-1]), seq=hidden_BSD.shape[1])
        known = self.sums[layer]
        self.sums[layer] = found.sums if known is None else known.add_(found.sums)
        self.entries[layer] += self._located(found)

    def _located(self, found: Sketch) -> list[Entry]:
        seq = self.window_BS.shape[1]
        rows = [(value, *divmod(int(token), seq), int(channel)) for size, value, token, channel in found.top.tolist() if size >= 0]
        return [Entry(v, self.first_window + b, s, c, int(self.window_BS[b, s])) for v, b, s, c in rows]

    def summaries(self) -> list[Summary]:
        """Layer by layer."""
        return [summary(sums.cpu(), entries) for sums, entries in zip(self.sums, self.entries, strict=True) if sums is not None]


def look(subject: Subject, windows_NS: Tensor, batch: int = 1, label: str = "existence") -> list[Summary]:
    """The residual stream after each block, over all windows."""
    watch = StreamWatch(len(subject.blocks))
    with subject.watch(subject.blocks, watch.see):
        for window_BS in batches(windows_NS, batch, label):
            watch.window_BS = window_BS
            subject.run(window_BS)
            watch.first_window += window_BS.shape[0]
    found = watch.summaries()
    check_finite(subject, found)
    return found


def check_finite(subject: Subject, found: list[Summary]) -> None:
    """Refuse what has no statistics: fp16 ends at 65504, below what some models reach (Gemma 3: 774144)."""
    for layer, seen in enumerate(found):
        if seen.num_nonfinite:
            how = "use --dtype fp32" if subject.dtype != torch.float32 else "its weights are broken"
            dtype = str(subject.dtype).removeprefix("torch.")
            raise UserError(f"{subject.name}: {seen.num_nonfinite} values behind layer {layer} are not finite in {dtype}: {how}")


def _run(arguments: argparse.Namespace) -> None:
    subject = shared.subject_of(arguments)
    output = shared.output_of(arguments)
    data, tables = {}, []
    for bos in shared.settings_of(arguments, subject):
        name = "with BOS" if bos else "without BOS"
        found = look(subject, shared.windows_of(arguments, subject, bos), arguments.batch, name)
        data[name] = [dict(seen._asdict(), massive=seen.is_massive) for seen in found]
        rows = [[i, seen.largest, seen.median, seen.ratio, seen.is_massive] for i, seen in enumerate(found)]
        tables.append(Table(f"{subject.name}, {name}", ["layer", f"largest of {TOP}", "median", "ratio", "massive"], rows))
    output.write("existence", data, tables)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model_arguments(parser)
    shared.add_text_arguments(parser)
    shared.add_bos_argument(parser)
    shared.add_output_argument(parser)


ANALYSIS = shared.Analysis("existence", "does it have massive activations, and where: layers, channels, tokens", _add_arguments, _run)
