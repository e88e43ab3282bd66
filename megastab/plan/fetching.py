"""How often ZeRO 3 gathers each weight in a micro-batch: DeepSpeed 0.19.8's coordinator, replayed on the order of use.

A layer's weights are gathered when it runs and let go after it, unless (a) they come again within ``stage3_max_reuse_distance``
elements, or (b) the prefetcher, which looks ahead by up to ``stage3_prefetch_bucket_size`` elements at each layer and holds at most
``stage3_max_live_parameters``, has already counted on them being there. So a model below these limits is gathered once a micro-batch,
and a large one twice, but for its last layers (runtime/zero/partitioned_param_coordinator.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from megastab.config.config import Config
from megastab.plan.parameters import Stage
from megastab.plan.zero import kept_whole, zero_setting

Use = tuple[str, ...]
"""Names of the weights of one layer that runs."""


@dataclass
class Limits:
    """In elements; live ones are counted, reuse is looked for over whole weights."""

    reuse: int
    prefetch: int
    live: int


@dataclass
class Coordinator:
    """What is whole on the rank while a micro-batch runs."""

    sizes: dict[str, int]
    kept: frozenset[str]
    limits: Limits
    uses: Sequence[Use]
    gathers: Counter[str] = field(default_factory=Counter)
    here: set[str] = field(default_factory=set)
    live: int = 0
    peak: int = 0
    """Elements whole at once, without those that always are."""

    def __post_init__(self) -> None:
        self.queue = [(name, step) for step, use in enumerate(self.uses) for name in use]
        self.place = 0
        self.counted_on: dict[str, int] = {}
        self.last_use: dict[tuple[str, int], int] = {}

    def run(self) -> Coordinator:
        """Itself, after a micro-batch; every use is a layer's run, after which its weights are let go."""
        for step, use in enumerate(self.uses):
            for name in use:
                self._gather(name)
                if self.counted_on.get(name, -1) < step:
                    self._pass_over(name, step)
            self._prefetch()
            self._release(step, use)
        return self

    def _gather(self, name: str) -> None:
        if name not in self.here and name not in self.kept:
            self.gathers[name] += 1
            self.here.add(name)
            self.live += self.sizes[name]
            self.peak = max(self.peak, self.live)

    def _pass_over(self, name: str, step: int) -> None:
        while self.place < len(self.queue) and self.queue[self.place][1] <= step:
            passed, at = self.queue[self.place]
            self.counted_on[passed] = max(self.counted_on.get(passed, -1), at)
            self.place += 1

    def _prefetch(self) -> None:
        room, taken = min(self.limits.live - self.live, self.limits.prefetch), 0
        while self.limits.prefetch and self.place < len(self.queue) and taken < room:
            name, at = self.queue[self.place]
            self.place += 1
            self.counted_on[name] = max(self.counted_on.get(name, -1), at)
            if name not in self.here and name not in self.kept:
                taken += self.sizes[name]
                self._gather(name)

    def _release(self, step: int, use: Use) -> None:
        leaving = {name for name in use if name in self.here and self.counted_on.get(name, -1) <= step}
        passed = 0
        for later in islice(self.uses, step + 1, None):
            if not leaving or passed >= self.limits.reuse:
                break
            leaving.difference_update(later)
            passed += sum(self.sizes[name] for name in later)
        for name in leaving:
            self.here.discard(name)
            self.live -= self.sizes[name]


def fetched(config: Config, stage: Stage) -> Coordinator:
    """The coordinator after one micro-batch: how often each weight was gathered, and how much was whole at once."""
    limits = Limits(
        int(zero_setting(config, "max_reuse_distance", 1_000_000_000)),
        int(zero_setting(config, "prefetch_bucket_size", 50_000_000)),
        int(zero_setting(config, "max_live_parameters", 1_000_000_000)),
    )
    sizes = {weight.name: weight.elements for weight in stage.weights}
    kept = frozenset(weight.name for weight in kept_whole(config, stage.weights))
    return Coordinator(sizes, kept, limits, uses(config, stage)).run()


def uses(config: Config, stage: Stage) -> list[Use]:
    """The layers of a micro-batch in the order they run: forward, then backward with what is recomputed in it."""
    blocks: dict[str, list[Use]] = {}
    order: list[Use] = []
    layers: dict[str, list[str]] = {}
    for weight in stage.weights:
        layers.setdefault(_layer_of(weight.name), []).append(weight.name)
    for layer, names in _in_order(layers):
        order.append(tuple(names))
        if layer.startswith("layers."):
            blocks.setdefault(layer.split(".")[1], []).append(tuple(names))
    if config.megastab.model.tie_embeddings:
        order.append(("embedding",))
    backward: list[Use] = []
    recomputed = config.megastab.parallel.recompute == "full"
    seen: set[str] = set()
    for use in reversed(order):
        block = use[0].split(".")[1] if use[0].startswith("layers.") else ""
        if recomputed and block and block not in seen:
            seen.add(block)
            backward += blocks[block][:-1]  # recomputation ends inside the last layer, whose backward has begun it
        backward.append(use)
    return [*order, *backward]


def _layer_of(name: str) -> str:
    """Weights of one module come together: a matrix and its bias, a norm's vectors."""
    for ending in (".bias", ".gain", ".alpha"):
        name = name.removesuffix(ending)
    return name


PLACES = ("attention_norm", "qkv", "q", "kv", "q_norm", "k_norm", "sink", "o", "attention_output_norm", "mlp_norm", "up", "down")


def _in_order(layers: dict[str, list[str]]) -> list[tuple[str, list[str]]]:
    """Layers as they run; inside a block they are listed norms first."""

    def place(layer: str) -> int:
        last = layer.rsplit(".", 1)[1]
        return PLACES.index(last) if last in PLACES else len(PLACES)

    before = [(name, held) for name, held in layers.items() if not name.startswith("layers.") and name not in ("final_norm", "head")]
    after = [(name, layers[name]) for name in ("final_norm", "head") if name in layers]
    inside = [(name, held) for name, held in layers.items() if name.startswith("layers.")]
    inside.sort(key=lambda item: (int(item[0].split(".")[1]), place(item[0])))
    return [*before, *inside, *after]
