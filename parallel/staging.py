"""A bounded buffer in shared memory through which tensors go to a forked writer; who fills it waits for room.

Both sides know the sizes in order, so both know every place in the ring; only counts are sent, one byte per tensor.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

_ALIGNMENT = 64
_WAIT_S = 1.0
_MADV_DONTNEED = 4


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the ring a tensor goes."""

    offset: int
    after: int
    """So many tensors, from the first one on, must have left before it may be written."""


def plan_places(sizes_bytes: Sequence[int], capacity_bytes: int) -> list[Place]:
    """Places of tensors that pass through a ring in order, each in one run of bytes; none is larger than the ring."""
    places: list[Place] = []
    ends: list[int] = []
    head = oldest = 0
    for number, size in enumerate(sizes_bytes):
        assert size <= capacity_bytes, (size, capacity_bytes)
        if head + size > capacity_bytes:
            head = 0
        # tensors of the lap before that lie where this one goes; they leave in order
        after = oldest
        for other in range(oldest, number):
            if places[other].offset < head + size and head < ends[other]:
                after = other + 1
        places.append(Place(head, after))
        ends.append(head + size)
        oldest = after
        head += size + -size % _ALIGNMENT
    return places


class Staging:
    """Made before the fork; then the parent calls `fill` and the child `tensors`."""

    def __init__(self, tensors: Sequence[torch.Tensor], capacity_bytes: int) -> None:
        """tensors: in the order in which they pass. capacity_bytes: at least that of the largest one."""
        self._shapes = [(tensor.shape, tensor.dtype, tensor.nbytes) for tensor in tensors]
        self._places = plan_places([tensor.nbytes for tensor in tensors], capacity_bytes)
        # no larger than what passes
        whole = sum(tensor.nbytes + _ALIGNMENT for tensor in tensors)
        self._memory = mmap.mmap(-1, max(mmap.PAGESIZE, min(capacity_bytes, whole)))
        self._ready, self._freed = os.pipe(), os.pipe()

    @property
    def num_bytes(self) -> int:
        """Host memory that it takes."""
        return len(self._memory)

    def fill(self, tensors: Sequence[torch.Tensor], alive: Callable[[], bool]) -> None:
        """Copy all tensors into the ring as there is room; returns early when the writer is not alive any more.

        alive: asked about once a second while there is no room, and after each wait.
        """
        os.close(self._ready[0])
        os.close(self._freed[1])
        freed = 0
        try:
            for number, (tensor, place) in enumerate(zip(tensors, self._places, strict=True)):
                while freed < place.after:
                    if select.select([self._freed[0]], [], [], _WAIT_S)[0]:
                        freed += len(os.read(self._freed[0], 4096))
                    if not alive():
                        return
                self._view(number).copy_(tensor)
                os.write(self._ready[1], b".")
        except BrokenPipeError:
            return  # it is dead: whoever asks for its outcome hears why
        finally:
            os.close(self._ready[1])
            os.close(self._freed[0])

    def tensors(self) -> Iterator[torch.Tensor]:
        """In the child: each tensor in turn; its place is free again when the next one is asked for."""
        os.close(self._ready[1])
        os.close(self._freed[0])
        for number in range(len(self._places)):
            if not os.read(self._ready[0], 1):
                raise EOFError("the trainer has stopped to hand over tensors")
            yield self._view(number)
            # nobody listens any more once all tensors have been handed over
            with contextlib.suppress(BrokenPipeError):
                os.write(self._freed[1], b".")

    def _view(self, number: int) -> torch.Tensor:
        shape, dtype, num_bytes = self._shapes[number]
        if not num_bytes:
            return torch.empty(shape, dtype=dtype)
        offset = self._places[number].offset
        count = num_bytes // dtype.itemsize
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset).view(shape)


def forget(tensors: Sequence[torch.Tensor]) -> None:
    """In a forked child: give back the pages of tensors that it will not read, so that the parent, when it changes
    them, does not have to copy them first."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for tensor in tensors:
        if tensor.device.type == "cpu":
            first = tensor.data_ptr() + -tensor.data_ptr() % mmap.PAGESIZE
            end = tensor.data_ptr() + tensor.nbytes
            if first < end:
                madvise(first, (end - first) // mmap.PAGESIZE * mmap.PAGESIZE, _MADV_DONTNEED)
