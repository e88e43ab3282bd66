"""How often ZeRO 3 gathers each weight in a micro-batch: DeepSpeed 0.19.8's coordinator, replayed on the order of use.

A layer's weights are gathered when it runs and let go after it, unless (a) they come again within ``stage3_max_reuse_distance``
elements, or (b) the prefetcher, which looks ahead by up to ``stage3_prefetch_bucket_size`` elements at each layer and holds at most
``stage3_max_live_parameters``, has already counted on them being there. So a model below these limits is gathered once a micro-batch,
and a large one twice, but for its last layers (runtime/zero/partitioned_param_coordinator.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
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


Tree = list["Tree"] | Use
"""A module that holds others, and is a turn of its own for the prefetcher, or a layer with weights (or without: the empty use)."""


def uses(config: Config, stage: Stage) -> list[Use]:
    """The modules of a micro-batch in the order they run: forward, then backward with what is recomputed in it."""
    layers: dict[str, list[str]] = {}
    for weight in stage.weights:
        layers.setdefault(_layer_of(weight.name), []).append(weight.name)
    model, recompute = config.megastab.model, config.megastab.parallel.recompute
    before = [tuple(held) for name, held in layers.items() if not name.startswith("layers.") and name not in ("final_norm", "head")]
    after = [tuple(layers[name]) for name in ("final_norm", "head") if name in layers]
    blocks: list[Tree] = [_block(layers, index, recompute == "selective") for index in range(model.num_layers)]
    ends: list[Tree] = [*after, ("embedding",)] if model.tie_embeddings else [*after]
    whole: Tree = [*before, *blocks, *ends]
    again = recompute == "full"
    drops_last = bool(model.dropout) and model.norm_position != "post"
    return [*_forward(whole), *_backward(whole, blocks if again else [], drops_last)]


def _block(layers: dict[str, list[str]], index: int, is_open: bool) -> Tree:
    """A block's modules; selective recompute calls attention's and the MLP's layers, not these themselves."""

    def of(*names: str) -> list[Tree]:
        return [tuple(layers[key]) for name in names if (key := f"layers.{index}.{name}") in layers]

    def branch(inner: list[Tree]) -> list[Tree]:
        return inner if is_open else [inner]

    attention = branch(of("qkv", "q", "kv", "q_norm", "k_norm", "sink", "o"))
    mlp = branch(of("up", "down"))
    dropout: Tree = ()
    first = [*of("attention_norm"), *attention, *of("attention_output_norm"), dropout]
    return [*first, *of("mlp_norm"), *mlp, *of("mlp_output_norm"), dropout]


def _forward(tree: Tree) -> Iterator[Use]:
    if isinstance(tree, tuple):
        yield tree
        return
    yield ()
    for child in tree:
        yield from _forward(child)


def _backward(tree: Tree, recomputed: list[Tree], drops_last: bool) -> Iterator[Use]:
    if isinstance(tree, tuple):
        yield tree
        return
    yield ()
    if any(tree is block for block in recomputed):
        forward = list(_forward(tree))[1:]
        # Recomputation ends inside the last layer that saves something, whose backward has begun it: one with weights, or dropout.
        yield from forward[: -1 if drops_last else max(i for i, use in enumerate(forward) if use)]
    for child in reversed(tree):
        yield from _backward(child, recomputed, drops_last)


def _layer_of(name: str) -> str:
    """Weights of one module come together: a matrix and its bias, a norm's vectors."""
    for ending in (".bias", ".gain", ".alpha"):
        name = name.removesuffix(ending)
    return name
