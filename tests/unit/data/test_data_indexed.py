"""Datasets of ours and of Megatron-LM open alike; each kind of damage is named before megatron is asked."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from megastab.config.errors import UserError
from megastab.data.index_file import token_dtype, write_index
from megastab.data.indexed import open_indexed
from megastab.data.prepare import prepare
from megastab.data.tokenizer import Tokenizer


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """Three documents of ids below 100, without a sidecar."""
    lengths = np.array([5, 1, 4], np.int32)
    np.arange(90, 100, dtype=np.uint16).tofile(tmp_path / "d.bin")
    write_index(tmp_path / "d.idx", lengths, np.dtype(np.uint16))
    return str(tmp_path / "d")


def test_flat_view_of_our_own_file(prefix: str) -> None:
    file = open_indexed(prefix, vocab_size=100)
    assert file.tokens.tolist() == list(range(90, 100))
    assert (file.starts.tolist(), file.lengths.tolist()) == ([0, 5, 6], [5, 1, 4])


def test_megatron_documents_of_several_sequences(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=np.int32)
    builder.add_item(torch.tensor([1, 2, 3]))
    builder.add_item(torch.tensor([4]))
    builder.end_document()
    builder.end_document()  # an empty document
    builder.add_document(torch.tensor([5, 6, 70_000]), [1, 2])
    builder.finalize(str(tmp_path / "d.idx"))
    file = open_indexed(tmp_path / "d")
    assert file.tokens.tolist() == [1, 2, 3, 4, 5, 6, 70_000]
    assert (file.starts.tolist(), file.lengths.tolist()) == ([0, 4, 4], [4, 0, 3])


def test_dtype_follows_megatrons_rule() -> None:
    from megatron.core.datasets.indexed_dataset import DType

    for vocab_size in (256, 65_499, 65_500, 65_536, 128_000):
        assert token_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_missing_file_is_named(prefix: str, suffix: str) -> None:
    Path(prefix + suffix).unlink()
    with pytest.raises(UserError, match=rf"no file .*d\{suffix}; make it"):
        open_indexed(prefix)


def test_prefix_with_suffix_is_explained(prefix: str) -> None:
    with pytest.raises(UserError, match="without .bin or .idx"):
        open_indexed(f"{prefix}.bin")


def damage(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(bytes(content))


LENGTHS, OFFSETS, MARKS = 34, 34 + 3 * 4, 34 + 3 * 12
DAMAGES = {
    "magic": (0, b"NOTANIDX", "not a Megatron index"),
    "version": (9, struct.pack("<Q", 2), "version 2"),
    "dtype_code": (17, b"\x63", "dtype 99"),
    "float_items": (17, b"\x07", "float32 items, not token ids"),
    "sequence_count": (18, struct.pack("<Q", 4), "cut off or damaged"),
    "negative_length": (LENGTHS, struct.pack("<i", -5), "contradicts itself"),
    "longer_sequence": (LENGTHS, struct.pack("<i", 6), "one after the other"),
    "last_sequence": (LENGTHS + 8, struct.pack("<i", 5), r"d\.bin: is 20 bytes but its index needs 22"),
    "offset": (OFFSETS + 8, struct.pack("<q", 4), "one after the other"),
    "document_mark": (MARKS + 24, struct.pack("<q", 2), "contradicts itself"),
    "descending_marks": (MARKS + 8, struct.pack("<q", 3), "contradicts itself"),
}


@pytest.mark.parametrize(("offset", "data", "said"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_index_is_refused(prefix: str, offset: int, data: bytes, said: str) -> None:
    damage(Path(f"{prefix}.idx"), offset, data)
    with pytest.raises(UserError, match=said):
        open_indexed(prefix)


@pytest.mark.parametrize("kept_bytes", [0, 10, 33, 34, 50, 101])
def test_truncated_index_is_refused(prefix: str, kept_bytes: int) -> None:
    path = Path(f"{prefix}.idx")
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(UserError, match="cut off"):
        open_indexed(prefix)


def test_short_bin_is_refused(prefix: str) -> None:
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="is 19 bytes but its index needs 20"):
        open_indexed(prefix)


def test_empty_datasets_are_refused(tmp_path: Path) -> None:
    (tmp_path / "d.bin").touch()
    for lengths, said in (([], "no documents"), ([0, 0], "no tokens")):
        write_index(tmp_path / "d.idx", np.array(lengths, np.int32), np.dtype(np.uint16))
        with pytest.raises(UserError, match=said):
            open_indexed(tmp_path / "d")


def test_ids_outside_the_vocabulary_are_refused(prefix: str) -> None:
    with pytest.raises(UserError, match="token id 99, outside vocab_size 99"):
        open_indexed(prefix, vocab_size=99)


def test_ids_are_probed_at_both_ends_of_a_long_file(tmp_path: Path) -> None:
    tokens = np.zeros(2_000_000, np.int32)
    write_index(tmp_path / "d.idx", np.array([len(tokens)], np.int32), tokens.dtype)
    for place, wrong in ((0, 50), (-1, 50), (-1, -3)):
        tokens[:] = 0
        tokens[place] = wrong
        tokens.tofile(tmp_path / "d.bin")
        with pytest.raises(UserError, match=f"token id {wrong}"):
            open_indexed(tmp_path / "d", vocab_size=50)


def test_another_tokenizer_is_refused(tokenizer: Tokenizer, corpus: Path, tmp_path: Path) -> None:
    prepare([corpus], tmp_path / "d", tokenizer.path)
    open_indexed(tmp_path / "d", tokenizer, vocab_size=512)
    with pytest.raises(UserError, match="400 pieces but the model only vocab_size 384"):
        open_indexed(tmp_path / "d", tokenizer, vocab_size=384)
    sidecar = json.loads((tmp_path / "d.json").read_text())
    (tmp_path / "d.json").write_text(json.dumps({**sidecar, "tokenizer": "0" * 64}))
    with pytest.raises(UserError, match="another tokenizer"):
        open_indexed(tmp_path / "d", tokenizer)


def test_unreadable_sidecar_is_refused(prefix: str) -> None:
    for text in ("{", "[]", '{"tokenizer": "x"}'):
        Path(f"{prefix}.json").write_text(text)
        with pytest.raises(UserError, match="not a dataset's sidecar"):
            open_indexed(prefix)
