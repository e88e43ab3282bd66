"""The sample a tokenizer is trained on, read by several ranks, equal to the one that one process reads.

Units take their turn from small to large; each may use an equal share of the bytes that those before it left. How much a unit holds is
known only once it is read, so the ranks read to the least that each share can be, tell each other how much there was, and read on in the
units whose share has grown, until none has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megastab.data.documents import Unit, read_documents
from megastab.data.world import World

_MORE_BYTES = 4096  # kept of the last document beyond what is needed, since shares grow by a few bytes from rounding


@dataclass(frozen=True)
class Extract:
    """The beginning of a unit's text."""

    documents: list[bytes]
    num_bytes: int
    is_whole: bool
    """Whether the unit holds no more."""


def sample(units: Sequence[Unit], key: str, max_bytes: int, world: World) -> Iterator[bytes]:
    """On rank 0 the documents in order, cut where a share ends; nothing on the others, which must exhaust it all the same."""
    ordered = sorted(units, key=lambda unit: unit.num_bytes)
    extracts: dict[int, Extract] = {}
    caps = [max_bytes // len(ordered)] * len(ordered)
    while True:
        for number in range(world.rank, len(ordered), world.size):  # neighbours in size go to different ranks
            if number not in extracts or _is_short((extracts[number].num_bytes, extracts[number].is_whole), caps[number]):
                extracts[number] = extract(ordered[number], key, caps[number])
        told = world.of_all({number: (part.num_bytes, part.is_whole) for number, part in extracts.items()})
        amounts = [told[number % world.size][number] for number in range(len(ordered))]
        caps = shares(amounts, max_bytes)
        if not any(map(_is_short, amounts, caps)):
            break
    for number, cap in enumerate(caps):
        owner = number % world.size
        if owner == world.rank == 0:
            yield from _cut_off(extracts.pop(number).documents, cap)
        elif world.rank == 0:
            yield from world.receive(owner)
        elif owner == world.rank:
            world.send(_cut_off(extracts.pop(number).documents, cap))


def _is_short(amount: tuple[int, bool], cap: int) -> bool:
    return amount[0] < cap and not amount[1]


def shares(amounts: Sequence[tuple[int, bool]], max_bytes: int) -> list[int]:
    """Bytes each unit may use, given (bytes read, whether that is all) of each in turn; never more than it will be with more read."""
    left, caps = max_bytes, []
    for done, (num_bytes, is_whole) in enumerate(amounts):
        share = left // (len(amounts) - done)
        caps.append(share)
        left -= min(num_bytes, share) if is_whole else share
    return caps


def extract(unit: Unit, key: str, cap: int) -> Extract:
    """A unit's documents until they reach ``cap`` bytes; the last may go a little beyond."""
    documents: list[bytes] = []
    num_bytes = 0
    for document in read_documents(unit, key):
        if num_bytes >= cap:
            return Extract(documents, num_bytes, False)
        documents.append(document[: cap - num_bytes + _MORE_BYTES])
        num_bytes += len(documents[-1])
        if len(documents[-1]) < len(document):
            return Extract(documents, num_bytes, False)
    return Extract(documents, num_bytes, True)


def _cut_off(documents: list[bytes], cap: int) -> list[bytes]:
    kept = []
    for document in documents:
        kept.append(document[:cap])
        cap -= len(kept[-1])
        if cap <= 0:
            break
    return kept
