"""An open shard file read by byte position, where everything that goes wrong names file and offset.

What the bytes mean is `index.py`.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np


class ShardError(ValueError):
    """A shard that is missing, truncated or inconsistent; the message names the file and the offset."""


@dataclass(frozen=True, slots=True)
class Section:
    """One array inside an open file: where it starts and what it holds."""

    file: "ShardFile"
    offset_bytes: int
    dtype: np.dtype
    count: int

    def read(self, start: int, count: int) -> np.ndarray:
        """Elements [start, start + count) as an array of the section's dtype."""
        assert 0 <= start <= start + count <= self.count, (start, count, self.count)
        offset_bytes = self.offset_bytes + start * self.dtype.itemsize
        return np.frombuffer(self.file.read(offset_bytes, count * self.dtype.itemsize), dtype=self.dtype)


class ShardFile:
    """An open file read by position.

    Reads are `pread` calls, not a mapping: a mapped file that is truncated under a running job kills
    the process with SIGBUS, a short `pread` is an error that can name the shard and the offset.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
            self.num_bytes = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise ShardError(
                f"shard file '{path}' cannot be opened ({error.strerror}): a shard is a .bin and an .idx "
                "file with one name; check the prefix and the permissions, or prepare the shard again"
            ) from error

    def read(self, offset_bytes: int, num_bytes: int) -> bytes:
        """Exactly `num_bytes` bytes from `offset_bytes`, or a ShardError."""
        pieces = bytearray()
        while len(pieces) < num_bytes:
            try:
                piece = os.pread(self._descriptor, num_bytes - len(pieces), offset_bytes + len(pieces))
            except OSError as error:
                self.fail(offset_bytes + len(pieces), f"reading failed ({error.strerror})", "a readable file")
            if not piece:
                self.fail(
                    offset_bytes + len(pieces),
                    "the file ends here",
                    f"{num_bytes} bytes from offset {offset_bytes} of {self.num_bytes} when it was opened",
                )
            pieces += piece
        return bytes(pieces)

    def fail(self, offset_bytes: int, found: str, allowed: str) -> NoReturn:
        """Raise the ShardError for something wrong at a byte offset of this file."""
        raise ShardError(
            f"shard file '{self.path}' at offset {offset_bytes}: {found}; expected {allowed}; "
            "restore the file from a copy or prepare the shard again"
        )

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
