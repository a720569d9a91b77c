"""The order in which one epoch visits the documents of a shard, found by token position.

Rule. Documents are grouped in blocks of adjacent documents, B = the smallest power of two that leaves at
most 2^18 blocks (so up to 262,144 documents are shuffled one by one). An epoch permutes the blocks, then
the documents inside each block, both by keyed permutations of (key, epoch). The token count of a block is
the difference of two byte offsets that the index holds already, so start-up reads one index entry per
block and sums at most 2^18 numbers: nothing depends on a pass over the lengths, nothing is cached on disk.
Adjacent documents of a large shard thus stay within one block; `pack.py` spreads them over the epoch by
permuting the rows cut from this order.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data_pipeline.index import TokenShard
from data_pipeline.permute import KeyedPermutation, derive_key

MAX_BLOCKS = 2**18
NUM_BLOCKS_CACHED = 64


class Place(NamedTuple):
    """Where a token position of an epoch falls."""

    document_start: int
    """First token of the document, in tokens from the start of the shard."""
    document_length: int
    """Tokens of the document, at least 1."""
    offset: int
    """Tokens of the document before the position."""


def documents_per_block(num_documents: int, max_blocks: int = MAX_BLOCKS) -> int:
    """The smallest power of two that leaves at most `max_blocks` blocks."""
    return 1 << max(0, (-(-num_documents // max_blocks) - 1).bit_length())


class Blocks:
    """The blocks of one shard: where they start, and the documents of one block, read when asked for."""

    def __init__(self, shard: TokenShard, max_blocks: int = MAX_BLOCKS) -> None:
        self.shard = shard
        self.documents_per_block = documents_per_block(shard.num_documents, max_blocks)
        self.starts = shard.block_starts(self.documents_per_block)
        self.num_blocks = len(self.starts) - 1

    def document_starts(self, block: int) -> np.ndarray:
        """Token offsets of the documents of a block and of its end: int64 [documents + 1]."""
        first = block * self.documents_per_block
        last = min(first + self.documents_per_block, self.shard.num_documents)
        return self.shard.document_starts(first, last)


class EpochOrder:
    """One epoch's order: position in [0, num_tokens) -> document and offset, in O(log documents)."""

    def __init__(self, blocks: Blocks, key: int, epoch: int) -> None:
        self._blocks = blocks
        self._key = derive_key(key, "epoch", epoch)
        self._visited = KeyedPermutation(blocks.num_blocks, derive_key(self._key, "blocks")).all()
        self._ends = np.cumsum(np.diff(blocks.starts)[self._visited])
        self._documents = lru_cache(maxsize=NUM_BLOCKS_CACHED)(self._permuted_documents)

    def locate(self, position: int) -> Place:
        """The document at a token position of this epoch.

        Raises:
            ShardError: the index is damaged where the document is described.
        """
        place = int(np.searchsorted(self._ends, position, side="right"))
        block = int(self._visited[place])
        start, end = int(self._blocks.starts[block]), int(self._blocks.starts[block + 1])
        offset = position - int(self._ends[place]) + end - start
        if self._blocks.documents_per_block == 1:
            return Place(start, end - start, offset)
        starts_N, ends_N = self._documents(block)
        number = int(np.searchsorted(ends_N, offset, side="right"))
        length = int(ends_N[number] - (ends_N[number - 1] if number else 0))
        return Place(int(starts_N[number]), length, offset - int(ends_N[number]) + length)

    def _permuted_documents(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of a block's documents in this epoch's order: token offsets, and token counts summed up."""
        borders = self._blocks.document_starts(block)
        num_documents = len(borders) - 1
        order = KeyedPermutation(num_documents, derive_key(self._key, "documents", block)).all()
        return borders[:-1][order], np.cumsum(np.diff(borders)[order])
