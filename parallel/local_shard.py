"""One rank's whole state as one node keeps it: in memory, and as a small checkpoint of its own on a node's disk.

Unlike a shared checkpoint it leaves nothing out that another rank also holds, so a rank reads its own shard and no
other. On disk it has the files of a shared one (`parallel/manifest.py`, `parallel/pieces.py`): a table, a manifest that
appears last, and a directory that gets its name in one rename.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron.core
import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from parallel import manifest as disk
from parallel import pieces, stored_tensors
from parallel.checksum import Checksum
from parallel.manifest import Entry, FileRecord, Manifest

_STATE_NAME = "state.bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What one rank needs to go on."""

    step: int
    layout: dict[str, Any]
    """Sizes of the parallel axes; only a rank of the same layout can use it."""
    extra: dict[str, Any]
    rows: list[list[Any]]
    """key, dtype, global shape, offsets, sizes, first byte, bytes of each tensor, in the order of the payload."""
    payload: torch.Tensor
    """The numbers of all tensors, one after the other: uint8 in host memory."""

    @property
    def header(self) -> dict[str, Any]:
        """Everything but the payload, as JSON has it."""
        return {"step": self.step, "layout": self.layout, "extra": self.extra, "rows": self.rows}


def directory_of(directory: Path, node: str, run_dir: Path) -> Path:
    """Where a node keeps the copies of a run, below `directory`; there is a directory per timeline in it."""
    absolute = run_dir.resolve()
    return directory / node / f"{absolute.name}-{hashlib.sha256(str(absolute).encode()).hexdigest()[:8]}"


def shards_seen(directory: Path, run_dir: Path) -> Iterator[tuple[str, str, Entry]]:
    """Node, rank's directory and shard of all copies of a run that this machine sees; its timeline's only. Local."""
    timeline = disk.timeline(run_dir / "checkpoints")
    for node in sorted(path.name for path in directory.iterdir()) if directory.is_dir() else ():
        for root in sorted((directory_of(directory, node, run_dir) / timeline).glob("rank_*")):
            for entry in disk.list_checkpoints(root):
                yield node, root.name, entry


def shard_of(step: int, state: ShardedStateDict, layout: dict[str, Any], extra: dict[str, Any]) -> Shard:
    """A copy of this rank's state in host memory. No collective."""
    tensors, _ = stored_tensors.extract_tensors(state)
    leaves = stored_tensors.leaves(tensors)
    rows: list[list[Any]] = []
    start = 0
    for leaf in leaves:
        assert leaf.data is not None, leaf
        sizes = [1] * leaf.prepend_axis_num + list(leaf.data.shape)
        dtype = str(leaf.dtype).removeprefix("torch.")
        place = [start, leaf.data.nbytes]
        rows.append([leaf.key, dtype, list(leaf.global_shape), list(leaf.global_offset), sizes, *place])
        start += leaf.data.nbytes
    payload = torch.empty(start, dtype=torch.uint8)
    for leaf, (*_, first, num_bytes) in zip(leaves, rows, strict=True):
        payload[first : first + num_bytes] = leaf.data.detach().reshape(-1).view(torch.uint8)
    return Shard(step=step, layout=layout, extra=extra, rows=rows, payload=payload)


def write_shard(root: Path, shard: Shard, *, keep: int) -> None:
    """Make a shard a directory below `root`, complete or not at all. It may run in a forked child.

    keep: so many of the newest stay there; 0 deletes none.
    """
    root.mkdir(parents=True, exist_ok=True)
    directory = disk.partial_path(root, shard.step, secrets.token_hex(4))
    directory.mkdir()
    try:
        table, record = _write_payload(directory, shard)
        content = disk.canonical_json(table)
        disk.write_manifest(
            directory,
            Manifest(
                step=shard.step,
                files=(record, disk.write_durably(directory / stored_tensors.TABLE_NAME, content)),
                tensors_sha256=disk.sha256_of_json(stored_tensors.logical_table(table)),
                layout=shard.layout,
                versions={"torch": torch.__version__, "megatron-core": megatron.core.__version__},
                extra=shard.extra,
            ),
        )
        disk.publish(directory, root, shard.step)
    except OSError:
        # it may be what fills the disk
        shutil.rmtree(directory, ignore_errors=True)
        raise
    for entry in disk.list_checkpoints(root)[:-keep] if keep else ():
        disk.remove(root, entry.step, secrets.token_hex(4))


def _write_payload(directory: Path, shard: Shard) -> tuple[dict[str, Any], FileRecord]:
    """Write and flush the numbers; the table that says where they lie, and the file's record."""
    table: dict[str, Any] = {}
    digest = hashlib.sha256()
    memory = pieces.memory_of(shard.payload)
    with (directory / _STATE_NAME).open("wb", buffering=0) as stream:
        for key, dtype, shape, offsets, sizes, start, num_bytes in shard.rows:
            numbers = memory[start : start + num_bytes]
            checksum = Checksum()
            checksum.add_blocks(numbers)
            digest.update(numbers)
            written = 0
            while written < num_bytes:
                # an unbuffered write may take less than it is given
                written += stream.write(numbers[written:]) or 0
            entry = table.setdefault(key, {"dtype": dtype, "shape": shape, "pieces": []})
            entry["pieces"].append(
                [offsets, sizes, _STATE_NAME, start, num_bytes, start, checksum.hexdigest()]
            )
        os.fsync(stream.fileno())
    return table, FileRecord(_STATE_NAME, len(memory), digest.hexdigest())


def read_shard(directory: Path) -> Shard:
    """A shard from disk, every byte checked.

    Raises:
        CheckpointError: it is not complete, or not what was written.
    """
    manifest = disk.read_manifest(directory)
    disk.check_files(directory, manifest.files, hashed=False)
    table = stored_tensors.read_table(directory, manifest)
    stored = [(key, entry, pieces.Piece.of(row)) for key, entry in table.items() for row in entry["pieces"]]
    stored.sort(key=lambda one: one[2].start)
    payload = torch.empty(sum(piece.length for *_, piece in stored), dtype=torch.uint8)

    def read(piece: pieces.Piece) -> None:
        target = payload[piece.start : piece.start + piece.length]
        pieces.read_piece(directory, piece, target, verify=True)

    pieces.take_turns(read, [piece for *_, piece in stored])
    rows = [
        [
            key,
            entry["dtype"],
            entry["shape"],
            list(piece.offsets),
            list(piece.sizes),
            piece.start,
            piece.length,
        ]
        for key, entry, piece in stored
    ]
    return Shard(step=manifest.step, layout=manifest.layout, extra=manifest.extra, rows=rows, payload=payload)
