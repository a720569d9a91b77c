"""Cuts the documents of a pack into blocks of tiles, in the order of time; pure functions of the shapes.

What goes through the matmuls of the chunked path together. The CUDA kernel's work is planned in plan.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch

CHUNK_TOKENS = 64
"""Tokens of a full tile, as in the kernel. Longer tiles cost more products, shorter ones more passes over the state."""

BLOCK_BYTES = {2: 512 * 1024, 4: 256 * 1024, 8: 256 * 1024}
"""What one operand of a block may take, by the bytes of an element. All of a block should stay in a core's cache; but
16-bit products take so little time that calls count, and there are fewer of them in larger blocks."""

Span = tuple[int, int]
"""Tokens [start, stop) of one document, or of a part of one that is taken for a whole document."""


def spans_of(borders: tuple[int, ...]) -> tuple[Span, ...]:
    """The documents between ascending borders."""
    return tuple(pairwise(borders))


@dataclass(frozen=True, slots=True)
class Block:
    """Tokens [start, stop) that go through the matmuls together: full tiles of one document, the shorter tile at the
    end of one, or a tile that several whole documents share."""

    start: int
    stop: int
    num_tiles: int
    first_document: int
    lengths: tuple[int, ...]
    """Tokens of each document here, numbered from first_document on."""
    opens: bool
    closes: bool

    @property
    def tile_tokens(self) -> int:
        return (self.stop - self.start) // self.num_tiles

    @property
    def documents(self) -> slice:
        return slice(self.first_document, self.first_document + len(self.lengths))


@lru_cache(maxsize=256)
def plan_blocks(spans: tuple[Span, ...], tiles_per_block: int) -> tuple[Block, ...]:
    """Cut the documents into blocks, in the order of time.

    Long documents are cut from their own start. Neighbouring documents that fit into one tile together
    share it, so that a pack of short documents costs as many matmuls as one long one.
    """
    blocks: list[Block] = []
    shared: list[tuple[int, int, int]] = []

    def flush() -> None:
        if shared:
            lengths = tuple(stop - start for _, start, stop in shared)
            blocks.append(Block(shared[0][1], shared[-1][2], 1, shared[0][0], lengths, True, True))
            shared.clear()

    for document, (start, stop) in enumerate(spans):
        if shared and (start != shared[-1][2] or stop - shared[0][1] > CHUNK_TOKENS):
            flush()
        if stop - start <= CHUNK_TOKENS:
            shared.append((document, start, stop))
            continue
        full_tiles_end = stop - (stop - start) % CHUNK_TOKENS
        cuts = [*range(start, full_tiles_end, tiles_per_block * CHUNK_TOKENS), full_tiles_end]
        if full_tiles_end < stop:
            cuts.append(stop)
        for cut, end in pairwise(cuts):
            num_tiles = max(1, (end - cut) // CHUNK_TOKENS)
            blocks.append(Block(cut, end, num_tiles, document, (end - cut,), cut == start, end == stop))
    flush()
    return tuple(blocks)


def blocks_for(operand_THD: torch.Tensor, spans: tuple[Span, ...]) -> tuple[Block, ...]:
    """The plan for operands like this one: as many tiles per block as the cache holds."""
    element_bytes = operand_THD.element_size()
    tile_bytes = CHUNK_TOKENS * operand_THD[0].numel() * element_bytes
    return plan_blocks(spans, max(1, BLOCK_BYTES[element_bytes] // tile_bytes))
