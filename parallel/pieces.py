"""Reads stored pieces of tensors into memory, checked, on several threads. No collective, nothing is unpickled.

A piece is one record of a shard file: a head, the numbers as they lie in memory, a tail. Its place, and where in it the
numbers begin, stand in the tensor table; the head (a pickle, for upstream's tools) is checked and never opened.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from parallel.checksum import BLOCK_BYTES, Checksum
from parallel.manifest import CheckpointError

# what the processor's cache of one core still holds when it is summed
_STEP_BYTES = BLOCK_BYTES
_MOST_THREADS = 8
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Piece:
    """One row of a tensor's `pieces` in the table, in its order."""

    offsets: tuple[int, ...]
    """Where the piece begins in the whole tensor."""
    sizes: tuple[int, ...]
    file: str
    start: int
    """First byte of the record."""
    length: int
    """Bytes of the record."""
    data_start: int
    """First byte of the numbers."""
    checksum: str
    """Of the whole record."""

    @staticmethod
    def of(row: list[Any]) -> Piece:
        """A row as JSON has it."""
        offsets, sizes, *rest = row
        return Piece(tuple(offsets), tuple(sizes), *rest)


@dataclass(frozen=True, slots=True)
class _Part:
    """What one wanted tensor takes from one piece."""

    piece: Piece
    target: torch.Tensor
    """The wanted tensor where the piece goes."""
    source: tuple[slice, ...]
    """Where that lies in the piece."""


def fill(leaf: ShardedTensor, entry: dict[str, Any]) -> list[_Part]:
    """What must be read to fill `leaf`, in place, from a tensor of the table.

    Raises:
        CheckpointError: the pieces do not cover it.
    """
    assert leaf.data is not None, leaf
    whole = leaf.data.detach()[(None,) * leaf.prepend_axis_num]
    parts, elements = [], 0
    for row in entry["pieces"]:
        piece = Piece.of(row)
        into, out_of = [], []
        for own, size, first, count in zip(
            leaf.global_offset, whole.shape, piece.offsets, piece.sizes, strict=True
        ):
            begin, end = max(own, first), min(own + size, first + count)
            into.append(slice(begin - own, max(begin, end) - own))
            out_of.append(slice(begin - first, max(begin, end) - first))
        target = whole[tuple(into)]
        if target.numel():
            parts.append(_Part(piece, target, tuple(out_of)))
            elements += target.numel()
    if elements != whole.numel():
        raise CheckpointError(
            f"the stored pieces of {leaf.key} hold {elements} of the {whole.numel()} wanted elements: every one must "
            "be stored once; the table is damaged, choose another step of this run"
        )
    return parts


def read_all(parts: list[_Part], directory: Path, *, verify: bool) -> None:
    """Read all parts; the first error ends it.

    Raises:
        CheckpointError: a record is cut, or is not what was written (with `verify`).
    """
    take_turns(lambda part: _read(part, directory, verify), parts)


def take_turns(action: Callable[[Item], None], items: Sequence[Item]) -> None:
    """Do `action` for every item, on this thread and a few others; the first error ends it.

    This thread takes part, because ranks that share cores have none to spare for one that only waits.
    """
    left, one_by_one = iter(items), threading.Lock()

    def take() -> None:
        while True:
            with one_by_one:
                item = next(left, None)
            if item is None:
                return
            try:
                action(item)
            except BaseException:
                with one_by_one:
                    # nobody needs the rest
                    deque(left, maxlen=0)
                raise

    num_threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)), len(items))
    # a pool must have a thread, and starts none that has nothing to do
    with ThreadPoolExecutor(max(1, num_threads - 1)) as pool:
        others = [pool.submit(take) for _ in range(num_threads - 1)]
        take()
        for other in others:
            other.result()


def _read(part: _Part, directory: Path, verify: bool) -> None:
    piece, target = part.piece, part.target
    if tuple(target.shape) == piece.sizes and target.is_contiguous() and target.device.type == "cpu":
        read_piece(directory, piece, target, verify=verify)
        return
    staged = torch.empty(piece.sizes, dtype=target.dtype)
    read_piece(directory, piece, staged, verify=verify)
    target.copy_(staged[part.source])


def read_piece(directory: Path, piece: Piece, target: torch.Tensor, *, verify: bool) -> None:
    """Read the numbers of a piece into a contiguous CPU tensor of its shape."""
    numbers = memory_of(target)
    data_end, end = piece.data_start + len(numbers), piece.start + piece.length
    path = directory / piece.file
    checksum = Checksum()
    with path.open("rb", buffering=0) as file:
        descriptor = file.fileno()
        if verify:
            checksum.add_short(os.pread(descriptor, piece.data_start - piece.start, piece.start))
        for start in range(0, len(numbers), _STEP_BYTES):
            step = numbers[start : start + _STEP_BYTES]
            _read_into(step, descriptor, piece.data_start + start, path)
            if verify:
                # while it is in the processor's cache
                checksum.add_blocks(step)
        if verify:
            checksum.add_short(os.pread(descriptor, end - data_end, data_end))
    if verify and checksum.hexdigest() != piece.checksum:
        raise CheckpointError(
            f"{path} has checksum {checksum.hexdigest()[:16]}... in bytes {piece.start} to {end}: the table lists "
            f"{piece.checksum[:16]}..., so its content has changed since it was written; restore it from a copy, or "
            "choose another step of this run"
        )


def _read_into(buffer: memoryview, descriptor: int, position: int, path: Path) -> None:
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], position + done)
        if not count:
            raise CheckpointError(
                f"{path} ends at byte {position + done}: the table lists more, so it was cut; restore it from a "
                "copy, or choose another step of this run"
            )
        done += count


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it."""
    array: np.ndarray = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return array.data
