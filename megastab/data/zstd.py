"""Reading ``.zst`` files as a stream that notices when the file is cut off, which zstandard's own reader takes for the end."""

from __future__ import annotations

import io
from typing import Any, BinaryIO, cast

from megastab.config.errors import UserError

_CHUNK_BYTES = 1 << 14  # compressed; small, because repetitive text grows a thousandfold
_MAX_WINDOW_BYTES = 1 << 31  # what ``zstd --long=31`` writes


def require_zstandard(path: str) -> Any:
    """The ``zstandard`` package."""
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{path}: reading .zst needs the zstandard package; pip install zstandard") from error
    return zstandard


def open_zst(path: str) -> BinaryIO:
    """The unpacked bytes; a damaged or cut-off file raises UserError while it is read."""
    return cast(BinaryIO, io.BufferedReader(_Unpacked(path), 1 << 18))


class _Unpacked(io.RawIOBase):
    def __init__(self, path: str) -> None:
        self._zstandard = require_zstandard(path)
        self._path = path
        self._source = io.FileIO(path)
        self._unpacker = self._zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        self._frame: Any = None  # the one under way
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """For the buffer on top."""
        return True

    def close(self) -> None:
        """Close the file too."""
        self._source.close()
        super().close()

    def readinto(self, target: Any) -> int:
        """Fill ``target``, 0 at the end of the last frame."""
        while not self._ready:
            if not self._packed and not (block := self._source.read(_CHUNK_BYTES)):
                if self._frame is not None:
                    raise self._damage("it ends inside a frame")
                return 0
            elif not self._packed:
                self._packed = block
            self._unpack()
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _unpack(self) -> None:
        self._frame = self._frame or self._unpacker.decompressobj()
        try:
            self._ready = memoryview(self._frame.decompress(self._packed))
        except self._zstandard.ZstdError as error:
            raise self._damage(str(error)) from error
        self._packed = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None

    def _damage(self, what: str) -> UserError:
        return UserError(f"{self._path}: damaged or cut-off zst file ({what}); fetch or compress it again")
