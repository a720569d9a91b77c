"""Token shards on disk: `PREFIX.bin` holds token ids, `PREFIX.idx` says where documents begin.

The format is megatron-core's IndexedDataset, version 1, text only; it is written and read here
without importing megatron-core, and the tests check both directions. `.idx`, little-endian:
    9 bytes "MMIDIDX\\0\\0", u64 version, u8 dtype code, u64 sequences n, u64 document borders d,
    int32 [n] sequence lengths, int64 [n] byte offsets into .bin, int64 [d] document borders
A border is the number of a document's first sequence; the last border is n. We write one sequence
per document and read any number. The byte offsets are the prefix sums that random access needs.
"""

import array
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from data_pipeline.atomic import flush_directory, partial_path, publish
from data_pipeline.shard_file import Section, ShardFile

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_OF_CODE: dict[int, np.dtype] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
MAX_VOCAB_UINT16 = 65_535
MAX_DOCUMENT_TOKENS = 2**31 - 1
COPY_DOCUMENTS = 2**16
COPY_TOKENS = 2**24


def token_dtype(vocab_size: int) -> np.dtype:
    """The on-disk type of token ids: uint16 up to a vocabulary of 65,535, else int32."""
    return np.dtype("<u2") if vocab_size <= MAX_VOCAB_UINT16 else np.dtype("<i4")


def bin_path(prefix: Path) -> Path:
    """The token file of a shard."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """The index file of a shard."""
    return prefix.with_name(prefix.name + ".idx")


class ShardWriter:
    """Writes one shard, document by document; nothing bears the shard's name before `finish`.

    Used as a context manager it finishes on a clean exit and removes its temporary files on an error.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        """`vocab_size` is the number of ids the tokenizer can produce; it sets the on-disk type."""
        self.prefix = Path(prefix)
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self._lengths_N = array.array("i")
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._stream = open(partial_path(bin_path(self.prefix)), "wb")  # noqa: SIM115

    def add_document(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append one document of at least one token id in [0, vocab_size).

        Raises:
            ValueError: no tokens, too many tokens, or an id outside the vocabulary.
        """
        tokens_S = np.asarray(tokens)
        number = len(self._lengths_N)
        if not 0 < tokens_S.size <= MAX_DOCUMENT_TOKENS:
            raise ValueError(
                f"document {number} of shard '{self.prefix}' has {tokens_S.size} tokens: a document has 1 to "
                f"{MAX_DOCUMENT_TOKENS} tokens; leave out empty documents, split longer ones"
            )
        low, high = int(tokens_S.min()), int(tokens_S.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"document {number} of shard '{self.prefix}' has token ids from {low} to {high}: ids are 0 "
                f"to {self.vocab_size - 1}; open the shard with the vocabulary size of its tokenizer"
            )
        self._stream.write(tokens_S.astype(self.dtype).tobytes())
        self._lengths_N.append(tokens_S.size)

    def add_shard(self, shard: "TokenShard") -> None:
        """Append all documents of another shard with the same on-disk type.

        Raises:
            ShardError: the other shard is damaged.
        """
        assert shard.dtype == self.dtype, (shard.prefix, shard.dtype, self.dtype)
        for first in range(0, shard.num_documents, COPY_DOCUMENTS):
            starts = shard.document_starts(first, min(first + COPY_DOCUMENTS, shard.num_documents))
            self._lengths_N.extend(np.diff(starts).tolist())
            for start in range(int(starts[0]), int(starts[-1]), COPY_TOKENS):
                tokens_S = shard.tokens(start, min(COPY_TOKENS, int(starts[-1]) - start))
                self._stream.write(tokens_S.astype(self.dtype).tobytes())

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths_N)

    def finish(self) -> None:
        """Flush both files and give them their names, the index last: its presence marks a whole shard."""
        flush_and_close(self._stream)
        with open(partial_path(idx_path(self.prefix)), "wb") as stream:
            write_index(stream, np.frombuffer(self._lengths_N, dtype=np.int32), self.dtype)
            flush_and_close(stream)
        # An old index must never describe the new tokens, not even between two renames.
        idx_path(self.prefix).unlink(missing_ok=True)
        flush_directory(self.prefix.parent)
        publish(bin_path(self.prefix))
        publish(idx_path(self.prefix))

    def discard(self) -> None:
        """Remove what was written so far."""
        self._stream.close()
        partial_path(bin_path(self.prefix)).unlink(missing_ok=True)
        partial_path(idx_path(self.prefix)).unlink(missing_ok=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.finish()
        else:
            self.discard()


def flush_and_close(stream: BinaryIO) -> None:
    """Put a stream's content on the disk and close it."""
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


def write_index(stream: BinaryIO, lengths_N: np.ndarray, dtype: np.dtype) -> None:
    """Write the index of documents with `lengths_N` tokens (int32 [N]), one sequence each."""
    num_documents = len(lengths_N)
    stream.write(HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[dtype], num_documents, num_documents + 1))
    ends_N = np.cumsum(lengths_N, dtype=np.int64) * dtype.itemsize
    stream.write(lengths_N.astype("<i4").tobytes())
    stream.write((ends_N - lengths_N.astype(np.int64) * dtype.itemsize).astype("<i8").tobytes())
    stream.write(np.arange(num_documents + 1, dtype="<i8").tobytes())


class TokenShard:
    """Random access to the documents of one shard. Thread-safe; picklable (it reopens its files).

    Opening reads the header and the two ends of each array. The rest of the index is checked where it
    is read, so that opening takes the same time for any number of documents.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(prefix)
        self._idx = ShardFile(idx_path(self.prefix))
        self._bin = ShardFile(bin_path(self.prefix))
        self.dtype, num_sequences, num_borders = self._read_header()
        self.num_documents = num_borders - 1
        self.num_tokens = self._bin.num_bytes // self.dtype.itemsize
        lengths_bytes = HEADER.size + 4 * num_sequences
        self._tokens = Section(self._bin, 0, self.dtype, self.num_tokens)
        self._lengths = Section(self._idx, HEADER.size, np.dtype("<i4"), num_sequences)
        self._offsets = Section(self._idx, lengths_bytes, np.dtype("<i8"), num_sequences)
        self._borders = Section(self._idx, lengths_bytes + 8 * num_sequences, np.dtype("<i8"), num_borders)
        self._check_ends()

    def _read_header(self) -> tuple[np.dtype, int, int]:
        magic, version, code, num_sequences, num_borders = HEADER.unpack(self._idx.read(0, HEADER.size))
        if magic != MAGIC:
            self._idx.fail(0, f"the file starts with {magic!r}", f"{MAGIC!r}, the start of an .idx file")
        if version != VERSION:
            self._idx.fail(9, f"index version {version}", f"version {VERSION}")
        if code not in DTYPE_OF_CODE:
            self._idx.fail(17, f"dtype code {code}", "4 (int32) or 8 (uint16) for token ids")
        if num_borders < 1:
            self._idx.fail(26, f"{num_borders} document borders", "at least 1")
        num_bytes = HEADER.size + 12 * num_sequences + 8 * num_borders
        if num_bytes != self._idx.num_bytes:
            self._idx.fail(
                min(num_bytes, self._idx.num_bytes),
                f"the file has {self._idx.num_bytes} bytes",
                f"{num_bytes} bytes for {num_sequences} sequences and {num_borders} document borders",
            )
        return DTYPE_OF_CODE[code], num_sequences, num_borders

    def _check_ends(self) -> None:
        if self._bin.num_bytes % self.dtype.itemsize:
            self._bin.fail(
                self._bin.num_bytes, f"{self._bin.num_bytes} bytes", f"a multiple of {self.dtype.itemsize}"
            )
        num_sequences = self._lengths.count
        first, last = int(self._borders.read(0, 1)[0]), int(self._borders.read(self.num_documents, 1)[0])
        if first != 0 or last != num_sequences:
            found = f"document borders from {first} to {last}"
            self._idx.fail(self._borders.offset_bytes, found, f"from 0 to {num_sequences}")
        end_bytes = 0
        if num_sequences:
            if (begin_bytes := int(self._offsets.read(0, 1)[0])) != 0:
                self._idx.fail(self._offsets.offset_bytes, f"first sequence at byte {begin_bytes}", "byte 0")
            end_bytes = int(self._offsets.read(num_sequences - 1, 1)[0])
            end_bytes += int(self._lengths.read(num_sequences - 1, 1)[0]) * self.dtype.itemsize
        if end_bytes != self._bin.num_bytes:
            self._bin.fail(
                min(end_bytes, self._bin.num_bytes),
                f"the file has {self._bin.num_bytes} bytes",
                f"{end_bytes} bytes, the end of the last sequence in '{self._idx.path.name}'",
            )

    def __len__(self) -> int:
        return self.num_documents

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return TokenShard, (self.prefix,)

    def document_starts(self, first: int, last: int) -> np.ndarray:
        """Token offsets where documents [first, last) begin and the last one ends: int64 [last-first+1].

        Raises:
            ShardError: the index contradicts itself in this range.
        """
        borders = self._borders.read(first, last - first + 1)
        begin, end = int(borders[0]), int(borders[-1])
        if begin < 0 or end > self._lengths.count or np.any(np.diff(borders) < 1):
            found = f"document borders {begin} to {end} do not increase"
            self._idx.fail(self._borders.offset_bytes + 8 * first, found, "increasing borders")
        lengths = self._lengths.read(begin, end - begin).astype(np.int64) * self.dtype.itemsize
        offsets = self._sequence_offsets(begin, end)
        wrong = np.flatnonzero((np.diff(offsets) != lengths) | (lengths < 0))
        if offsets[0] % self.dtype.itemsize or len(wrong):
            sequence = begin + int(wrong[0] if len(wrong) else 0)
            self._idx.fail(
                self._offsets.offset_bytes + 8 * sequence,
                f"sequence {sequence} starts at byte {offsets[sequence - begin]} and has "
                f"{lengths[sequence - begin]} bytes, the next starts at byte {offsets[sequence - begin + 1]}",
                "adjacent sequences",
            )
        return offsets[borders - begin] // self.dtype.itemsize

    def _sequence_offsets(self, begin: int, end: int) -> np.ndarray:
        """Byte offsets of sequences begin..end inclusive; sequence n is the end of the token file."""
        if end < self._offsets.count:
            return self._offsets.read(begin, end - begin + 1)
        return np.append(self._offsets.read(begin, end - begin), self._bin.num_bytes)

    def block_starts(self, documents_per_block: int) -> np.ndarray:
        """Token offsets where blocks of documents begin, and the end: int64 [ceil(documents / block) + 1].

        Reads one index entry per block, so 100 million documents in 200,000 blocks take well under a second.
        """
        if documents_per_block == 1:
            return self.document_starts(0, self.num_documents)
        all_borders = np.memmap(self._idx.path, "<i8", "r", self._borders.offset_bytes, (self.num_documents,))
        borders = np.asarray(all_borders[::documents_per_block])
        if np.any(borders < 0) or np.any(borders >= self._offsets.count):
            self._idx.fail(self._borders.offset_bytes, "document borders outside the sequences", "0 to n - 1")
        offsets = np.memmap(self._idx.path, "<i8", "r", self._offsets.offset_bytes, (self._offsets.count,))
        starts = np.append(offsets[borders], self._bin.num_bytes) // self.dtype.itemsize
        if np.any(np.diff(starts) < 0) or starts[0] != 0:
            self._idx.fail(self._offsets.offset_bytes, "sequence offsets decrease", "increasing byte offsets")
        return starts

    def tokens(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the whole shard: int32 [count], own memory."""
        return self._tokens.read(start, count).astype(np.int32)

    def document(self, number: int) -> np.ndarray:
        """The tokens of one document: int32 [length].

        Raises:
            IndexError: no such document.
            ShardError: the shard is damaged here.
        """
        if not 0 <= number < self.num_documents:
            raise IndexError(f"document {number} of '{self.prefix}', which has {self.num_documents}")
        start, end = self.document_starts(number, number + 1)
        return self.tokens(int(start), int(end - start))
