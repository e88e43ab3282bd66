"""Activations that wait outside the device (``parallel.activation_offload``): how much leaves in time, and over what it costs.

A stage's blocks one after another, f seconds forward and b backward each, as the products alone would take (what else takes time leaves
more of it). With ``amount: measured`` the engine's own rule says what of each block is out and back in time, at the cluster's bandwidth.
With ``all`` everything goes, and what the link takes longer than forward, or than backward, is waited for. A pipeline's stage has other
micro-batches between a forward and its backward, which share the link. What has not left when forward ends is counted as here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megastab.config.config import Config
from megastab.engine.offload_amount import SHARE, Seen, amounts
from megastab.plan.activations import ON_THEIR_WAY, Activations, activations, in_flight, movable
from megastab.plan.cluster import Cluster
from megastab.plan.parameters import Stage
from megastab.plan.work import stage_flops

MOST_RATE = 1e15  # bytes a second: where a search for the bandwidth that would do gives up


@dataclass(frozen=True)
class Offloaded:
    """Of one rank of a stage."""

    activations: Activations
    movable: int = 0
    """Bytes of a micro-batch that may leave."""
    rate: float = 0.0
    """Bytes a second each way that the cluster has for it."""
    needed: float = 0.0
    """Bytes a second each way that would let all of it go without waiting; inf where no time is left for it."""
    waits: float = 0.0
    """Seconds of a micro-batch that ``all`` waits for the link."""

    @property
    def share(self) -> float:
        """Of what may leave, what does."""
        return self.activations.away / self.movable if self.movable else 0.0


@dataclass(frozen=True)
class _Times:
    """Seconds of one micro-batch on a stage."""

    blocks: int
    forward: float
    """Of one block."""
    backward: float
    """Of one block, recomputation included."""
    head: float
    """Both ways."""
    between: float
    """Spent on other micro-batches between the end of forward and the beginning of backward."""

    @property
    def period(self) -> float:
        """Of the whole micro-batch."""
        return self.blocks * (self.forward + self.backward) + self.head

    def seen(self, size: int) -> list[Seen]:
        """What the engine would see of the blocks that may leave, ``size`` bytes each."""
        turn = self.blocks * self.forward + self.head + self.between
        begun = [turn + (self.blocks - 1 - i) * self.backward for i in range(self.blocks)]
        return [Seen((i + 1) * self.forward, begun[i + 1], begun[i], 0.0, size) for i in range(self.blocks - 1)]


def offloaded(config: Config, stage: Stage, cluster: Cluster) -> Offloaded:
    """What ``stage`` keeps where its activations are offloaded over the cluster's links; as it is where they are not."""
    section, one = config.megastab.parallel.activation_offload, movable(config)
    whole = one * max(0, stage.num_blocks - 1)
    if not whole:
        return Offloaded(activations(config, stage))
    rate = {"cpu": cluster.host_gb_per_s, "ssd": cluster.disk_gb_per_s}[section.kind] * 1e9
    times = _times(config, stage, cluster)
    needed = _needed(times, one)
    if section.amount == "measured":
        sent = _in_time(times, one, rate)
        kept = activations(config, stage, sum(sent) / whole)
        late = kept.away - _out_by_backward(times, sent, rate)
        return Offloaded(
            replace(kept, moving=max(late, ON_THEIR_WAY * kept.away // max(ON_THEIR_WAY, times.blocks - 1))), whole, rate, needed
        )
    kept = activations(config, stage)
    links = (kept.away - kept.moving) / rate  # blocks on their way when backward comes are taken from memory
    waits = max(0.0, links - times.blocks * times.forward) + max(0.0, links - times.blocks * times.backward)
    return Offloaded(kept, whole, rate, needed, waits)


def _times(config: Config, stage: Stage, cluster: Cluster) -> _Times:
    rate = cluster.peak_tflops[config.precision] * 1e12 * cluster.efficiency
    forward, again = stage_flops(config, replace(stage, has_head=False))
    head = 3 * (stage_flops(config, stage)[0] - forward) / rate
    count = stage.num_blocks
    times = _Times(count, forward / count / rate, (2 * forward + again) / count / rate, head, 0.0)
    return replace(times, between=(in_flight(config, stage) - 1) * times.period)


def _in_time(times: _Times, one: int, rate: float) -> list[float]:
    """Bytes of each block that are out and back in time; in all no more than the link carries while a micro-batch lasts."""
    sent = amounts(times.seen(one), rate, rate)
    fits = min(1.0, SHARE * rate * times.period / max(1, sum(sent)))
    return [fits * size for size in sent]


def _out_by_backward(times: _Times, sent: list[float], rate: float) -> int:
    """Bytes of a micro-batch that have left when its forward ends, which waits for none."""
    out, clock, end = 0.0, 0.0, times.blocks * times.forward
    for block, size in enumerate(sent, start=1):
        begins = max(clock, block * times.forward)
        clock = begins + size / rate
        out += min(size, rate * max(0.0, end - begins))
    return int(out)


def _needed(times: _Times, one: int) -> float:
    """The least bandwidth with which all of it is in time."""
    low, high, whole = 0.0, MOST_RATE, one * (times.blocks - 1)
    if sum(_in_time(times, one, high)) < whole:
        return float("inf")
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if sum(_in_time(times, one, middle)) < whole else (low, middle)
    return high
