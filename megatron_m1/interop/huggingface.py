"""Weights in and out of the Hugging Face format of MiniMax-M1 and MiniMax-Text-01, in any layout.

Every rank reads only what it holds; on the way out rank 0 gathers and writes, through buffers of `buffer_bytes`,
so that neither direction needs memory for more than the model. A ledger proves that every tensor moved exactly once.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from megatron_m1.interop.config_json import Dialect, json_from_model
from megatron_m1.interop.ledger import Ledger
from megatron_m1.interop.mapping import (
    IGNORED_SUFFIXES,
    Published,
    check_partition,
    published_tensors,
)
from megatron_m1.interop.parts import Overlap, Owners, Part, find_overlap, find_owners, held_parts
from megatron_m1.interop.safetensors_files import (
    SINGLE_FILE,
    ShardReader,
    ShardWriter,
    StoredTensor,
    plan_shards,
    write_index,
)
from megatron_m1.model.hybrid import HybridModel
from parallel.groups import Groups

logger = logging.getLogger(__name__)

StoredAs = Literal["released", "fp32"]
BUFFER_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """How weights are written."""

    dialect: Dialect = "released"
    """Whose config.json: MiniMax's own code or the class inside transformers."""
    stored_as: StoredAs = "released"
    """released: bf16, routers fp32, as MiniMax publishes; fp32: everything fp32."""
    max_position_embeddings: int = 10_240_000
    """Longest context in tokens to state in config.json."""
    shard_bytes: int = 5 * 10**9
    """Largest file in bytes, unless one tensor is larger."""
    buffer_bytes: int = BUFFER_BYTES
    """Most bytes of a tensor that one buffer holds; rank 0 has one to write from and one to receive into."""


def import_weights(
    directory: Path, chunks: list[HybridModel], groups: Groups, *, buffer_bytes: int = BUFFER_BYTES
) -> Ledger:
    """Fill every parameter of a model from a published checkpoint; every rank calls it with its own chunks.

    Values take the dtype of the parameter they fill; a narrower one rounds and is named in the ledger.

    Raises:
        ValueError: the checkpoint is damaged, or its tensors are not those of this model.
    """
    model, reader = chunks[0].model, ShardReader(directory)
    tensors = published_tensors(model)
    ledger = Ledger(ignored=_compare_with_files(tensors, reader))
    parts = held_parts(chunks)
    owners = find_owners(list(parts), groups)
    check_partition(tensors, owners.shapes)
    pieces_of = defaultdict(list)
    for tensor in tensors:
        for piece in tensor.pieces:
            pieces_of[piece.key].append((tensor, piece))
    for part, data in parts.items():
        filled = 0
        for tensor, piece in pieces_of[part.key]:
            source_dtype = reader.dtype(tensor.name)
            if torch.promote_types(source_dtype, data.dtype) != data.dtype:
                ledger.rounded.add(tensor.name)
            rows_at_once = _rows_at_once(tensor.shape, source_dtype, buffer_bytes)
            for first in range(piece.first_row, piece.first_row + piece.num_rows, rows_at_once):
                overlap = find_overlap(tensor, piece, (first, first + rows_at_once), part)
                if overlap is None:
                    continue
                box = data[overlap.local]
                box.copy_(reader.read(tensor.name, overlap.source))
                filled += box.numel()
                if owners.rank_of[part] == dist.get_rank():
                    ledger.record(tensor.name, part.key, box.numel())
        assert filled == data.numel(), f"{part} has {data.numel()} elements, {filled} were filled"
    total = ledger.settle({t.name: _numel(t.shape) for t in tensors}, _numels(owners.shapes))
    if total.rounded and dist.get_rank() == 0:
        logger.info(
            "%d tensors were rounded to a narrower dtype, first %s", len(total.rounded), min(total.rounded)
        )
    return total


def export_weights(
    directory: Path, chunks: list[HybridModel], groups: Groups, export: Export | None = None
) -> Ledger:
    """Write config.json and safetensors files; every rank calls it, rank 0 writes, the index comes last.

    Raises:
        ValueError: the directory is not empty, or the config cannot be expressed in the dialect.
    """
    export = export or Export()
    model = chunks[0].model
    config = json_from_model(model, export.dialect, max_position_embeddings=export.max_position_embeddings)
    _require_empty(directory)
    tensors = {tensor.name: tensor for tensor in published_tensors(model)}
    parts = held_parts(chunks)
    owners = find_owners(list(parts), groups)
    check_partition(list(tensors.values()), owners.shapes)
    stored = [StoredTensor(t.name, _stored_dtype(t, export.stored_as), t.shape) for t in tensors.values()]
    shards = plan_shards(stored, export.shard_bytes)
    ledger = Ledger()
    for file, shard in shards.items():
        runs = (
            run
            for entry in shard
            for run in _gathered_runs(
                tensors[entry.name], entry.dtype, parts, owners, export.buffer_bytes, ledger
            )
        )
        if dist.get_rank() == 0:
            with ShardWriter(directory / file, shard) as writer:
                for run in runs:
                    writer.append(run)
        else:
            for _ in runs:
                pass
    # a published tensor is a target here: the two columns of the account change sides
    total = ledger.settle(_numels(owners.shapes), {name: _numel(t.shape) for name, t in tensors.items()})
    if dist.get_rank() == 0:
        (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if SINGLE_FILE not in shards:
            write_index(directory, shards)
    dist.barrier()
    return total


def _gathered_runs(
    tensor: Published,
    dtype: torch.dtype,
    parts: dict[Part, torch.Tensor],
    owners: Owners,
    buffer_bytes: int,
    ledger: Ledger,
) -> Iterator[torch.Tensor]:
    """Rows of a published tensor, from whoever holds them: whole on rank 0, empty buffers elsewhere.

    Every rank walks the same plan, so each send meets its receive.
    """
    rows_at_once = min(tensor.shape[0], _rows_at_once(tensor.shape, dtype, buffer_bytes))
    # one buffer for all runs: the caller has written a run before it asks for the next
    buffer = torch.empty((rows_at_once if dist.get_rank() == 0 else 0, *tensor.shape[1:]), dtype=dtype)
    for first in range(0, tensor.shape[0], rows_at_once):
        last = min(first + rows_at_once, tensor.shape[0])
        for piece in tensor.pieces:
            for part in owners.parts_of[piece.key]:
                overlap = find_overlap(tensor, piece, (first, last), part)
                if overlap is None:
                    continue
                rows, *columns = overlap.source
                place = buffer[(slice(rows.start - first, rows.stop - first), *columns)]
                _move_to_rank_0(parts.get(part), overlap, place, owners.rank_of[part])
                ledger.record(piece.key, tensor.name, place.numel())
        yield buffer[: last - first]


def _move_to_rank_0(data: torch.Tensor | None, overlap: Overlap, place: torch.Tensor, owner: int) -> None:
    """Copy the owner's box into its place in rank 0's buffer (an empty one elsewhere)."""
    me = dist.get_rank()
    if owner == me:
        assert data is not None, f"rank {me} owns a part it does not hold"
        box = data[overlap.local]
        if me == 0:
            place.copy_(box)
        else:
            dist.send(box.to(place.dtype).contiguous(), 0)
    elif me == 0:
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
        box = torch.empty(overlap.shape, dtype=place.dtype, device=device)
        dist.recv(box, owner)
        place.copy_(box)


def _compare_with_files(tensors: list[Published], reader: ShardReader) -> tuple[str, ...]:
    """Refuse names or shapes that are not the model's; gives the constants that are left out."""
    expected = {tensor.name: tensor.shape for tensor in tensors}
    ignored = tuple(sorted(name for name in reader.names() if name.endswith(IGNORED_SUFFIXES)))
    found = reader.names() - set(ignored)
    missing, unknown = sorted(expected.keys() - found), sorted(found - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} tensors {missing[:5]} and has {len(unknown)} unknown ones "
            f"{unknown[:5]}: it must hold exactly the {len(expected)} tensors of this model; check that its "
            "config.json is the one the model was built from"
        )
    for name, shape in expected.items():
        if reader.shape(name) != shape:
            raise ValueError(
                f"tensor {name} has shape {reader.shape(name)} in the checkpoint: this model needs {shape}; "
                "check that "
                "its config.json is the one the model was built from"
            )
    return ignored


def _require_empty(directory: Path) -> None:
    """All ranks learn from rank 0, the only one that writes, whether the directory may be used."""
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        found = sorted(path.name for path in directory.iterdir())
        if found:
            problem = [
                f"export directory {directory} already holds {len(found)} files, first {found[0]}: it must "
                "be empty, "
                "old shards would mix with new ones; choose another directory"
            ]
    dist.broadcast_object_list(problem, 0)
    if problem[0]:
        raise ValueError(problem[0])


def _stored_dtype(tensor: Published, stored_as: StoredAs) -> torch.dtype:
    return torch.float32 if stored_as == "fp32" or tensor.is_router else torch.bfloat16


def _rows_at_once(shape: tuple[int, ...], dtype: torch.dtype, buffer_bytes: int) -> int:
    return max(1, buffer_bytes // (dtype.itemsize * _numel(shape[1:])))


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _numels(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    return {name: _numel(shape) for name, shape in shapes.items()}
