"""Which block of the CUDA kernel walks what: documents, heads and 64 value columns as a list of work items.

Pure functions of the shapes, no device. csrc/launch.h defines the eight integers of an item.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

CHUNK_TOKENS = 64
VALUE_COLUMNS = 64
MIN_SEGMENT_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanPlan:
    """Work of one call: items of the main pass and of the state prepass (int32 [n, 8] on CPU), workspace slots."""

    items: torch.Tensor
    state_items: torch.Tensor
    num_slots: int
    segment_tokens: int


def segment_tokens_for(num_tokens: int, num_columns: int, num_multiprocessors: int) -> int:
    """Tokens of a segment: documents are cut only where heads alone leave half of the GPU idle.

    num_columns: heads times value blocks of 64. Depends on no document border, so a document's result does not
    depend on what it is packed with.
    """
    num_segments = num_multiprocessors // num_columns
    if num_segments < 2:
        return max(CHUNK_TOKENS, -(-num_tokens // CHUNK_TOKENS) * CHUNK_TOKENS)
    per_segment = -(-num_tokens // num_segments)
    return max(MIN_SEGMENT_TOKENS, -(-per_segment // CHUNK_TOKENS) * CHUNK_TOKENS)


def cut_document(start: int, stop: int, segment_tokens: int, reverse: bool) -> list[tuple[int, int]]:
    """(first token, tokens) of each segment in the order of (reversed) time; only the last may be short."""
    if stop - start <= segment_tokens:
        return [(start, stop - start)]
    if not reverse:
        return [(cut, min(segment_tokens, stop - cut)) for cut in range(start, stop, segment_tokens)]
    ends = range(stop, start, -segment_tokens)
    return [(max(start, end - segment_tokens), min(segment_tokens, end - start)) for end in ends]


def plan_scan(
    borders: tuple[int, ...], num_heads: int, value_dim: int, reverse: bool, num_multiprocessors: int
) -> ScanPlan:
    """Plan one call over all documents between borders."""
    return plan_spans(
        tuple(pairwise(borders)), borders[-1], num_heads, value_dim, reverse, num_multiprocessors
    )


def plan_spans(
    spans: tuple[tuple[int, int], ...],
    num_tokens: int,
    num_heads: int,
    value_dim: int,
    reverse: bool,
    num_multiprocessors: int,
) -> ScanPlan:
    """Plan one call over documents that are spans [start, stop) of num_tokens packed ones.

    Items are dealt to persistent blocks in turn, longest first and back and forth, which keeps the blocks' sums
    of tokens close.
    """
    value_blocks = value_dim // VALUE_COLUMNS
    segment_tokens = segment_tokens_for(num_tokens, num_heads * value_blocks, num_multiprocessors)
    segments: list[tuple[int, ...]] = []
    num_slots = 0
    for document, (start, stop) in enumerate(spans):
        cuts = cut_document(start, stop, segment_tokens, reverse)
        for earlier, (first, tokens) in enumerate(cuts):
            segments.append(
                (first, tokens, 0, 0, document, earlier, num_slots, int(earlier == len(cuts) - 1))
            )
        num_slots += len(cuts) - 1
    segments.sort(key=lambda segment: -segment[1])
    items = for_every_column(segments, num_heads, value_blocks)
    return ScanPlan(
        items=deal_out(items, num_multiprocessors),
        state_items=items[items[:, 7] == 0],
        num_slots=num_slots,
        segment_tokens=segment_tokens,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePlan:
    """Work of a prepass alone: the states of M spans, in S segments that are one slot of the workspace each."""

    items: torch.Tensor
    """int32 [n, 8] on CPU."""
    owned_MS: torch.Tensor
    """1 where a segment is part of a span, else 0."""
    after_MS: torch.Tensor
    """Tokens of the span that come after the segment in (reversed) time; 0 where it is not part of it."""

    @property
    def num_slots(self) -> int:
        """S."""
        return self.owned_MS.shape[1]


def plan_states(
    spans: tuple[tuple[int, int], ...],
    num_heads: int,
    value_dim: int,
    reverse: bool,
    num_multiprocessors: int,
) -> StatePlan:
    """Plan the states that spans of a pack leave; cut where heads alone leave half of the GPU idle."""
    value_blocks = value_dim // VALUE_COLUMNS
    segments: list[tuple[int, ...]] = []
    places: list[tuple[int, int, int]] = []
    for span, (start, stop) in enumerate(spans):
        length = segment_tokens_for(stop - start, num_heads * value_blocks, num_multiprocessors)
        rest = stop - start
        for first, tokens in cut_document(start, stop, length, reverse):
            rest -= tokens
            places.append((span, len(segments), rest))
            segments.append((first, tokens, 0, 0, span, 0, len(segments), 0))
    owned_MS = torch.zeros(len(spans), len(segments), dtype=torch.float64)
    after_MS = torch.zeros_like(owned_MS)
    for span, slot, rest in places:
        owned_MS[span, slot], after_MS[span, slot] = 1, rest
    items = for_every_column(sorted(segments, key=lambda segment: -segment[1]), num_heads, value_blocks)
    return StatePlan(items=items.contiguous(), owned_MS=owned_MS, after_MS=after_MS)


def for_every_column(segments: list[tuple[int, ...]], num_heads: int, value_blocks: int) -> torch.Tensor:
    """One item per segment, head and value block, in the order of the segments: int32 [n, 8]."""
    num_columns = num_heads * value_blocks
    items = torch.tensor(segments, dtype=torch.int32).repeat_interleave(num_columns, dim=0)
    columns = torch.arange(num_columns, dtype=torch.int32).repeat(len(segments))
    items[:, 2] = columns // value_blocks
    items[:, 3] = columns % value_blocks
    return items


def deal_out(items: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Every second whole round of num_blocks items backwards."""
    order = torch.arange(len(items))
    round_of = order // num_blocks
    mirrored = round_of * num_blocks + num_blocks - 1 - order % num_blocks
    backwards = (round_of % 2 == 1) & ((round_of + 1) * num_blocks <= len(items))
    return items[torch.where(backwards, mirrored, order)].contiguous()
