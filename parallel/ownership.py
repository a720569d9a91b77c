"""Tensors that are cut into flat ranges over a process group <-> whole tensors, each at one owning rank.

The distributed optimizer cuts without regard to tensors; storage wants whole ones, spread evenly over the
ranks. `Exchange.to_owners` and `Exchange.to_pieces` are each other's transpose: all-to-all, in batches of
bounded size.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

_BATCH_ELEMENTS = 64 << 20


@dataclass(frozen=True, slots=True)
class CutTensor:
    """A flat tensor, the range of it that each rank of the group holds, and the rank that is to have all of it."""

    ranges: tuple[tuple[int, int], ...]
    """(start, stop) in elements of the tensor, by rank; empty ranges have start == stop."""
    owner: int

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return sum(stop - start for start, stop in self.ranges)


def ranges_of(start: int, stop: int, bucket_stop: int, num_ranks: int) -> tuple[tuple[int, int], ...]:
    """What of a tensor at [start, stop) of a bucket [0, bucket_stop) lies in each of `num_ranks` equal parts
    of it.

    Returns: (start, stop) in elements of the tensor, by rank.
    """
    assert bucket_stop % num_ranks == 0, (bucket_stop, num_ranks)
    share = bucket_stop // num_ranks
    ranges = []
    for rank in range(num_ranks):
        first = min(max(rank * share, start), stop)
        last = max(min((rank + 1) * share, stop), first)
        ranges.append((first - start, last - start))
    return tuple(ranges)


def assign_owners(weights: Sequence[int], num_ranks: int) -> list[int]:
    """An owning rank for each weight, so that the sums by rank are about equal: heaviest first, to the
    lightest rank.

    Deterministic, so every rank of a group computes the same owners.
    """
    loads = [(0, rank) for rank in range(num_ranks)]
    owners = [0] * len(weights)
    for index in sorted(range(len(weights)), key=lambda index: (-weights[index], index)):
        load, owner = heapq.heappop(loads)
        owners[index] = owner
        heapq.heappush(loads, (load + weights[index], owner))
    return owners


class Exchange:
    """Moves a list of cut tensors of one dtype between their pieces and their owners. All methods are collective."""

    def __init__(self, cuts: Sequence[CutTensor], group: dist.ProcessGroup) -> None:
        self._cuts = list(cuts)
        self._group = group
        self._rank = group.rank()
        self._num_ranks = group.size()

    @property
    def owned(self) -> list[int]:
        """Indices of the tensors that this rank owns."""
        return [index for index, cut in enumerate(self._cuts) if cut.owner == self._rank]

    def to_owners(self, pieces: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        """Whole flat tensors in host memory at their owners, from this rank's flat pieces. Transpose:
        `to_pieces`.

        pieces: one per cut tensor, on one device, empty where this rank holds nothing.
        """
        whole: dict[int, torch.Tensor] = {}
        for batch in self._batches():
            sent = [
                pieces[index] for owner in range(self._num_ranks) for index in self._owned_by(owner, batch)
            ]
            received = self._all_to_all(torch.cat(sent), self._pieces_sizes(batch), self._wholes_sizes(batch))
            host = received.cpu()
            cursor = 0
            for index in self._owned_by(self._rank, batch):
                whole[index] = torch.empty(self._cuts[index].numel, dtype=host.dtype)
            for rank in range(self._num_ranks):
                for index in self._owned_by(self._rank, batch):
                    start, stop = self._cuts[index].ranges[rank]
                    whole[index][start:stop] = host[cursor : cursor + stop - start]
                    cursor += stop - start
        return whole

    def to_pieces(self, whole: Mapping[int, torch.Tensor], pieces: Sequence[torch.Tensor]) -> None:
        """Fill this rank's flat pieces from whole tensors at their owners. Transpose of `to_owners`.

        whole: the tensors of `owned`, any shape. pieces: one per cut tensor, written in place.
        """
        device, dtype = pieces[0].device, pieces[0].dtype
        for batch in self._batches():
            sent = [torch.empty(0, dtype=dtype)]
            for rank in range(self._num_ranks):
                for index in self._owned_by(self._rank, batch):
                    start, stop = self._cuts[index].ranges[rank]
                    sent.append(whole[index].reshape(-1)[start:stop])
            received = self._all_to_all(
                torch.cat(sent).to(device), self._wholes_sizes(batch), self._pieces_sizes(batch)
            )
            cursor = 0
            for owner in range(self._num_ranks):
                for index in self._owned_by(owner, batch):
                    pieces[index].copy_(received[cursor : cursor + pieces[index].numel()])
                    cursor += pieces[index].numel()

    def _batches(self) -> Iterator[range]:
        """Runs of tensors whose sum is bounded; a tensor above the bound is a batch of its own."""
        first, elements = 0, 0
        for index, cut in enumerate(self._cuts):
            if index > first and elements + cut.numel > _BATCH_ELEMENTS:
                yield range(first, index)
                first, elements = index, 0
            elements += cut.numel
        if self._cuts:
            yield range(first, len(self._cuts))

    def _owned_by(self, owner: int, batch: range) -> list[int]:
        return [index for index in batch if self._cuts[index].owner == owner]

    def _length(self, index: int, rank: int) -> int:
        start, stop = self._cuts[index].ranges[rank]
        return stop - start

    def _pieces_sizes(self, batch: range) -> list[int]:
        """Elements of this rank's pieces, by the rank that owns the tensor."""
        return [
            sum(self._length(index, self._rank) for index in self._owned_by(owner, batch))
            for owner in range(self._num_ranks)
        ]

    def _wholes_sizes(self, batch: range) -> list[int]:
        """Elements of the tensors this rank owns, by the rank that holds the piece."""
        return [
            sum(self._length(index, rank) for index in self._owned_by(self._rank, batch))
            for rank in range(self._num_ranks)
        ]

    def _all_to_all(
        self, sent: torch.Tensor, sent_sizes: list[int], received_sizes: list[int]
    ) -> torch.Tensor:
        received = torch.empty(sum(received_sizes), dtype=sent.dtype, device=sent.device)
        dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=self._group)
        return received
