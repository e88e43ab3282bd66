"""Train a SentencePiece tokenizer on a bounded, evenly spread sample of the input files.

Identity normalisation, no dummy prefix, whitespace kept (runs of spaces and newlines become pieces), bytes for rare characters.
Same inputs, same model, bit for bit: the number of threads and the order of the sample are fixed, and the model is written
through memory because SentencePiece stores the output path inside the file otherwise.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from megastab.config.errors import UserError
from megastab.data.documents import Unit, plan_units, read_documents
from megastab.data.sampling import sample
from megastab.data.tokenizer import EOD_PIECE, Tokenizer
from megastab.data.world import ALONE, World

_CHUNK_BYTES = 4096  # length of a training "sentence"
_RESERVED = "\u2585".encode()  # SentencePiece drops a whole sentence that holds its own sign for unknown
_NUM_THREADS = 4  # fixed, because unigram training sums in thread order


def train_tokenizer(
    inputs: Sequence[str | Path],
    out_prefix: str | Path,
    vocab_size: int,
    kind: Literal["bpe", "unigram"] = "bpe",
    *,
    key: str = "text",
    max_bytes: int = 20_000_000,
    character_coverage: float = 0.9995,
    world: World = ALONE,
) -> Tokenizer:
    """Write ``<out_prefix>.model`` with exactly ``vocab_size`` pieces, learnt from at most ``max_bytes`` of text.

    Collective over ``world``: its ranks read, rank 0 trains and writes; the model does not depend on their number.
    """
    units = world.from_first(lambda: plan_units(inputs))
    path = Path(f"{out_prefix}.model")
    if world.rank == 0:
        _publish(_train(_chunks(units, key, max_bytes, world), vocab_size, kind, character_coverage), path)
    else:
        for _ in sample(units, key, max_bytes, world):
            pass
    world.meet()
    return Tokenizer(path)


def _train(chunks: Iterator[bytes], vocab_size: int, kind: str, character_coverage: float) -> bytes:
    """The content of a model file."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=chunks,
            model_writer=model,
            vocab_size=vocab_size,
            model_type=kind,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            control_symbols=[EOD_PIECE],
            max_sentence_length=4 * _CHUNK_BYTES,
            num_threads=_NUM_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_translate(str(error), vocab_size)) from error
    return model.getvalue()


def _publish(model: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_bytes(model)
    partial.replace(path)


def _translate(message: str, vocab_size: int) -> str:
    """SentencePiece's words about the vocabulary size, with the numbers it found."""
    if found := re.search(r"size too high .*<= (\d+)", message):
        return f"vocab_size {vocab_size} is too large for this text, which yields at most {found[1]} pieces; lower it or give more text"
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size {vocab_size} is too small: bytes and single characters alone need {found[1]}; raise it or lower character_coverage"
        )
    if "sentences_.empty()" in message or "!sentences" in message:
        return "the input files hold no text to train a tokenizer on"
    return f"SentencePiece could not train the tokenizer (vocab_size {vocab_size}): {message}"


def _chunks(units: Sequence[Unit], key: str, max_bytes: int, world: World = ALONE) -> Iterator[bytes]:
    """Text of every unit in turn, each with an equal share of the bytes left, small units first so that none is wasted."""
    documents = _documents(units, key, max_bytes) if world.size == 1 else sample(units, key, max_bytes, world)
    return (piece for document in documents for piece in _cut(document))


def _documents(units: Sequence[Unit], key: str, max_bytes: int) -> Iterator[bytes]:
    """What ``sample`` gives on one rank, without holding it in memory."""
    left = max_bytes
    for done, unit in enumerate(sorted(units, key=lambda unit: unit.num_bytes)):
        share = left // (len(units) - done)
        for document in read_documents(unit, key):
            document = document[:share]
            yield document
            share -= len(document)
            left -= len(document)
            if share <= 0:
                break


def _cut(document: bytes) -> Iterator[bytes]:
    """Pieces of at most ``_CHUNK_BYTES``, after a newline where there is one, never inside a character."""
    start = 0
    while start < len(document):
        stop = min(start + _CHUNK_BYTES, len(document))
        if stop < len(document):
            stop = document.rfind(b"\n", start, stop) + 1 or stop
            while document[stop] & 0xC0 == 0x80:
                stop -= 1
        yield document[start:stop].replace(_RESERVED, b" ")
        start = stop
