"""A checksum at the speed of memory, for tensors that are checked whenever they are read.

sha256 takes longer than the read itself. Here each MiB is a matrix of 8-byte words, and what is hashed are the sums of
its columns and of its rows, mod 2^64. One changed word changes a column and a row, an exchanged row or block changes
sums or their order. It guards against disks and networks, not against people; files as a whole have a sha256 as well.
"""

from __future__ import annotations

import hashlib

import numpy as np

BLOCK_BYTES = 1 << 20
_ROW_BYTES = 4096


class Checksum:
    """Of bytes that arrive in order: short parts as they are, long ones in whole blocks."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add_short(self, part: bytes | memoryview) -> None:
        """A few bytes, in full."""
        self._digest.update(part)

    def add_blocks(self, part: memoryview) -> None:
        """Part of a long run of bytes: a multiple of BLOCK_BYTES, but for the last part. Releases the GIL."""
        for start in range(0, len(part), BLOCK_BYTES):
            block = part[start : start + BLOCK_BYTES]
            whole = len(block) - len(block) % _ROW_BYTES
            words = np.frombuffer(block[:whole], dtype=np.uint64).reshape(-1, _ROW_BYTES // 8)
            self._digest.update(words.sum(axis=0).data)
            self._digest.update(words.sum(axis=1).data)
            self._digest.update(block[whole:])

    def hexdigest(self) -> str:
        """The checksum as 32 hexadecimal digits."""
        return self._digest.hexdigest()[:32]
