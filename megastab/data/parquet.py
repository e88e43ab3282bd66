"""Documents out of ``.parquet`` files: a row is a document, its text a column of strings. Work is cut between row groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megastab.config.errors import UserError

_BATCH_ROWS = 256


def row_group_bytes(path: str) -> list[int]:
    """Size on disk of each row group."""
    metadata = _open(path).metadata
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    return [sum(group.column(column).total_compressed_size for column in range(group.num_columns)) for group in groups]


def read_rows(path: str, groups: tuple[int, int], key: str) -> Iterator[tuple[str, bytes]]:
    """(place in words, bytes) of every row of the row groups [first, stop)."""
    import pyarrow

    file = _open(path)
    _check_column(path, file.schema_arrow, key)
    first = sum(file.metadata.row_group(number).num_rows for number in range(groups[0]))
    try:
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=list(range(*groups)), columns=[key], use_threads=False):
            yield from ((f"{path}, row {row}", text) for row, text in enumerate(_texts(path, first, key, batch.column(0)), first + 1))
            first += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise _damage(path, error) from error


def _texts(path: str, first: int, key: str, column: Any) -> list[bytes]:
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    texts: list[bytes | None] = column.cast(pyarrow.large_string()).cast(pyarrow.large_binary()).to_pylist()
    if None in texts:
        raise UserError(f"{path}, row {first + texts.index(None) + 1}: {key!r} is null, not a string; mend or drop the row")
    return [text for text in texts if text is not None]


def _check_column(path: str, schema: Any, key: str) -> None:
    import pyarrow

    if key not in schema.names:
        raise UserError(f"{path}: no column {key!r}, only {sorted(schema.names)}; name the column of the text with --key")
    kind = schema.field(key).type
    plain = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if str(plain) not in ("string", "large_string", "string_view"):
        raise UserError(f"{path}: column {key!r} is {kind}, not string; name the column of the text with --key")


def _open(path: str) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{path}: reading .parquet needs the pyarrow package; pip install pyarrow") from error
    try:
        return parquet.ParquetFile(path, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damage(path, error) from error


def _damage(path: str, error: Exception) -> UserError:
    return UserError(f"{path}: damaged or cut-off parquet file ({error}); fetch or write it again")
