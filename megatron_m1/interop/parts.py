"""Which rank holds which part of a logical tensor, and what such a part shares with a published tensor."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_m1.interop.mapping import Piece, Published
from megatron_m1.model.hybrid import HybridModel
from parallel.groups import Groups


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's share of a logical tensor: a box in it."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Owners:
    """Which rank speaks for which part: of equal copies, the one of the lowest rank."""

    rank_of: dict[Part, int]
    parts_of: dict[str, list[Part]]
    shapes: dict[str, tuple[int, ...]]


def held_parts(chunks: list[HybridModel]) -> dict[Part, torch.Tensor]:
    """This rank's boxes and the parameters behind them."""
    return {
        Part(
            tensor.key, tuple(tensor.global_shape), tuple(tensor.global_offset), tuple(tensor.local_shape)
        ): tensor.data.detach()
        for chunk in chunks
        for tensor in chunk.logical_tensors().values()
    }


def find_owners(parts: list[Part], groups: Groups) -> Owners:
    """Exchange what every rank holds; the same answer on every rank."""
    held: list[Any] = [None] * groups.layout.world_size
    dist.all_gather_object(held, parts)
    rank_of: dict[Part, int] = {}
    parts_of: dict[str, list[Part]] = defaultdict(list)
    for rank, of_rank in enumerate(held):
        for part in of_rank:
            if part not in rank_of:
                rank_of[part] = rank
                parts_of[part.key].append(part)
    return Owners(rank_of, parts_of, {part.key: part.global_shape for part in rank_of})


@dataclass(frozen=True, slots=True)
class Overlap:
    """The same box in the coordinates of a published tensor and of a rank's own part."""

    source: tuple[slice, ...]
    local: tuple[int | slice, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis.stop - axis.start for axis in self.source)


def find_overlap(tensor: Published, piece: Piece, rows: tuple[int, int], part: Part) -> Overlap | None:
    """What a part holds of the rows [first, last) of a piece; None if nothing."""
    num_lead = len(piece.lead)
    lead = [index - start for index, start in zip(piece.lead, part.offset, strict=False)]
    if any(not 0 <= index < size for index, size in zip(lead, part.shape, strict=False)):
        return None
    shift = piece.logical_row - piece.first_row
    first = max(rows[0], piece.first_row, part.offset[num_lead] - shift)
    last = min(
        rows[1], piece.first_row + piece.num_rows, part.offset[num_lead] + part.shape[num_lead] - shift
    )
    if first >= last:
        return None
    start = shift - part.offset[num_lead]
    columns = zip(part.offset[num_lead + 1 :], part.shape[num_lead + 1 :], strict=True)
    source = (slice(first, last), *(slice(offset, offset + size) for offset, size in columns))
    assert len(source) == len(tensor.shape), f"{tensor.name} {tensor.shape} does not fit {part}"
    return Overlap(source, (*lead, slice(first + start, last + start)))
