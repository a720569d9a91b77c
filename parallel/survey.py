"""Looks at checkpoints from outside a run, in one process: which are whole, what differs between two, which may go."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from parallel import manifest as disk
from parallel import pieces, stored_tensors
from parallel.manifest import CheckpointError, Entry

_MOST_THREADS = 16


def problems_of(directory: Path, *, told: Callable[[int], None] = lambda _: None) -> list[str]:
    """Read a whole checkpoint and compare every file with its hash, on several threads.

    Args:
        directory: of the checkpoint.
        told: is called with the bytes of each file that has been read.

    Returns: one message per damaged file; empty when the checkpoint is as it was written.
    """
    try:
        records = disk.read_manifest(directory).files
    except CheckpointError as error:
        return [str(error)]

    def check(record: disk.FileRecord) -> str:
        problem = disk.wrong_file(directory, record, hashed=True)
        told(record.bytes)
        return problem

    # the largest first, so that no thread is left alone with it
    in_turn = sorted(records, key=lambda record: record.bytes, reverse=True)
    with ThreadPoolExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0)))) as pool:
        return sorted(problem for problem in pool.map(check, in_turn) if problem)


def prunable(root: Path, keep: int) -> tuple[list[Entry], list[Entry]]:
    """What may be deleted of the checkpoints under `root`: all complete ones but the newest `keep`.

    Returns: those to delete, and those that stay, each by ascending step; incomplete ones are in neither.

    Raises:
        CheckpointError: what stays has no checkpoint that is whole down to its hashes.
        ValueError: nothing would stay.
    """
    if keep < 1:
        raise ValueError(f"--keep {keep} would leave no checkpoint to go on from: it must be 1 or more")
    complete = [entry for entry in disk.list_checkpoints(root) if entry.complete]
    doomed, kept = complete[:-keep], complete[-keep:]
    if doomed and not any(not problems_of(entry.path) for entry in reversed(kept)):
        raise CheckpointError(
            f"the newest {len(kept)} checkpoints in {root} are all damaged: at least one of those that stay must be "
            "whole; look with `m1 ckpt verify`, and keep more"
        )
    return doomed, kept


def prune(root: Path, doomed: list[Entry]) -> None:
    """Delete checkpoints; each stops counting in one rename."""
    for entry in doomed:
        disk.remove(root, entry.step, secrets.token_hex(4))


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How one tensor differs between two checkpoints."""

    name: str
    what: str = ""
    """Why its values cannot be compared; empty where they were."""
    relative_rms: float = 0.0
    """RMS of the difference over RMS of the first; infinite where the first is zero and the second is not."""
    largest: float = 0.0
    """Largest absolute difference of an element."""


def differences(left: Path, right: Path) -> Iterator[Difference]:
    """The tensors that differ between two checkpoint directories, whatever layouts they were saved under.

    Memory: two of the stored pieces of the first. Every piece is checked as it is read.
    """
    tables = [stored_tensors.read_table(path, disk.read_manifest(path)) for path in (left, right)]
    first, second = tables
    for name in sorted(first.keys() | second.keys()):
        if name not in second or name not in first:
            yield Difference(name=name, what="only in the first" if name in first else "only in the second")
            continue
        about = [[table[name]["dtype"], table[name]["shape"]] for table in tables]
        if about[0] != about[1]:
            yield Difference(name=name, what=f"{about[0]} and {about[1]}")
            continue
        found = _compare(name, (left, first[name]), (right, second[name]))
        if found is not None:
            yield found


def _compare(
    name: str, one: tuple[Path, dict[str, Any]], two: tuple[Path, dict[str, Any]]
) -> Difference | None:
    squares = difference_squares = largest = 0.0
    equal = True
    for row in one[1]["pieces"]:
        piece = pieces.Piece.of(row)
        a, b = (_region(name, piece, *side) for side in (one, two))
        if torch.equal(a, b):
            squares += float(a.double().square().sum())
            continue
        equal = False
        a, b = a.double(), b.double()
        squares += float(a.square().sum())
        difference_squares += float((a - b).square().sum())
        largest = max(largest, float((a - b).abs().max()))
    if equal:
        return None
    relative = (difference_squares / squares) ** 0.5 if squares else float("inf")
    return Difference(name=name, relative_rms=relative, largest=largest)


def _region(name: str, piece: pieces.Piece, directory: Path, entry: dict[str, Any]) -> torch.Tensor:
    """The part of a stored tensor that lies where `piece` does."""
    values = torch.empty(piece.sizes, dtype=getattr(torch, entry["dtype"]))
    leaf = ShardedTensor(
        key=name,
        data=values,
        dtype=values.dtype,
        local_shape=piece.sizes,
        global_shape=tuple(entry["shape"]),
        global_offset=piece.offsets,
        axis_fragmentations=None,
    )
    pieces.read_all(pieces.fill(leaf, entry), directory, verify=True)
    return values
