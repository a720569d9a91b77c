"""How the tensors of a state become files, in megatron-core's torch_dist format. No directory names, no manifest.

megatron-core plans (which rank writes which piece of which logical tensor); the writing is ours, so that every byte
is hashed as it is written, in one pass, by a function that can run in a forked child: it uses no collective, no
queue and no other process. (Upstream's writer starts a manager process, and hangs when a writer dies or psutil is
missing.) Upstream's `.metadata` and `common.pt` are written too, so that its tools can read our checkpoints.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
)
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import (
    determine_global_metadata,
    validate_sharding_integrity,
)
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageInfo, _write_item
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from parallel.checksum import BLOCK_BYTES, Checksum
from parallel.manifest import CheckpointError, FileRecord, sha256_of_json, write_durably
from parallel.stored_tensors import TABLE_NAME, leaves

_UPSTREAM_NAMES = (".metadata", "metadata.json", "common.pt")


class ShardWriter(FileSystemWriterAsync):
    """megatron-core's storage writer up to the plan; what is planned is then written by `write`."""

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Note this rank's pieces where they are; upstream's version also copies them and starts a manager process."""
        self.file_name = f"{plan.storage_data.prefix}0.distcp"
        self.items = [(item, planner.resolve_data(item).detach()) for item in plan.items]
        self.num_bytes = sum(tensor.nbytes for _, tensor in self.items)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """This rank's pieces in the order of writing."""
        return [tensor for _, tensor in self.items]

    def copy_to_host(self) -> None:
        """Take all pieces into host memory, where a fork makes a snapshot of them."""
        self.items = [(item, _on_host(tensor)) for item, tensor in self.items]

    def release(self) -> None:
        """Drop the pieces; a child that was forked before keeps its own."""
        self.items = []

    def write(self, directory: Path, tensors: Iterable[torch.Tensor] | None = None) -> dict[str, Any]:
        """Write, flush and hash this rank's file. Safe in a forked child.

        tensors: where the pieces come from, in their order; None takes them from where they are, one at a time.

        Returns: JSON: the file's record and where each piece lies in it; an empty list of files if nothing is
        ours.
        """
        if not self.items:
            return {"files": [], "pieces": []}
        source = tensors if tensors is not None else map(_on_host, self.tensors)
        pieces = []
        with (
            _zip_checksums_off(),
            ThreadPoolExecutor(1) as hashing,
            (directory / self.file_name).open("wb", buffering=0) as raw,
        ):
            stream = _HashingStream(raw, hashing)
            try:
                for (item, _), tensor in zip(self.items, source, strict=True):
                    pieces.append(self._write_piece(stream, item, tensor))
            except RuntimeError as error:
                # torch's zip writer hides the error of the file below it behind one of its own
                raise stream.error or error from error
            os.fsync(raw.fileno())
        record = [self.file_name, stream.tell(), stream.digest.hexdigest()]
        return {"files": [record], "pieces": pieces}

    def _write_piece(self, stream: _HashingStream, item: WriteItem, tensor: torch.Tensor) -> list[Any]:
        stream.begin(tensor)
        result = _write_item(
            self.transforms, stream, tensor, item, self.file_name, SerializationFormat.TORCH_SAVE
        )
        stored = result.storage_data
        return [result.index.fqn, list(result.index.offset), stored.offset, stored.length, *stream.end()]


@contextlib.contextmanager
def _zip_checksums_off() -> Iterator[None]:
    """torch.save without the zip format's own checksum: every byte is hashed here anyway."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _HashingStream(io.RawIOBase):
    """A file that hashes what passes through, and finds in each piece where its numbers begin; sequential only."""

    def __init__(self, raw: io.RawIOBase, hashing: Executor) -> None:
        self._raw, self._hashing = raw, hashing
        self._position = 0
        self._numbers: tuple[int, int] = (0, 0)
        self._data_start: int | None = None
        self._checksum = Checksum()
        self.digest = hashlib.sha256()
        self.error: OSError | None = None
        """The first error of the file, such as a full disk."""

    def begin(self, tensor: torch.Tensor) -> None:
        """The record of a tensor begins here."""
        self._numbers = (tensor.data_ptr(), tensor.nbytes)
        self._data_start, self._checksum = None, Checksum()

    def end(self) -> tuple[int, str]:
        """The record ends here: the first byte of its numbers, and its checksum."""
        assert self._data_start is not None or not self._numbers[1], "torch.save wrote the numbers in pieces"
        start = self._position if self._data_start is None else self._data_start
        return start, self._checksum.hexdigest()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        are_numbers = self._data_start is None and len(view) > 0 and _place_of(view) == self._numbers
        if are_numbers:
            self._data_start = self._position
        if len(view) < BLOCK_BYTES:
            self._hash(view, are_numbers)
            return self._write(view)
        # hashing and writing both leave the interpreter to the other
        hashed = self._hashing.submit(self._hash, view, are_numbers)
        try:
            return self._write(view)
        finally:
            hashed.result()

    def _hash(self, view: memoryview, are_numbers: bool) -> None:
        self.digest.update(view)
        if are_numbers:
            self._checksum.add_blocks(view)
        else:
            self._checksum.add_short(view)

    def _write(self, view: memoryview) -> int:
        written = 0
        try:
            while written < len(view):
                # an unbuffered write may take less than it is given (2 GiB on Linux)
                written += self._raw.write(view[written:]) or 0
        except OSError as error:
            self.error = self.error or error
            raise
        self._position += written
        return written

    def tell(self) -> int:
        return self._position


def _place_of(view: memoryview) -> tuple[int, int]:
    """Address and length of bytes in memory."""
    return np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0], len(view)


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in host memory with storage of its own size; a CPU tensor that has that already is not copied."""
    tensor = tensor.detach().to("cpu")
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


class ReplicaSpread:
    """Which of the ranks that hold the same piece writes it: spread evenly, not all of it on the first of them."""

    def __init__(self, replicas: torch.distributed.ProcessGroup) -> None:
        self._group = replicas
        self._known = ""
        self._distribution: Any = None

    def is_new(self, tensors: dict[str, Any]) -> bool:
        """Whether these are other tensors than those last learned. Local."""
        return self._fingerprint(tensors) != self._known

    def learn(self, tensors: dict[str, Any]) -> list[list[ShardedTensor]]:
        """Spread these tensors; what all ranks hold, for `check_coverage`. Collective."""
        self._distribution = determine_main_replica_uniform_distribution(tensors, self._group)
        self._known = self._fingerprint(tensors)
        return determine_global_metadata(tensors)[1]

    def apply(self, tensors: dict[str, Any]) -> None:
        """Mark in `tensors`, in place, what this rank writes. Local."""
        distribute_main_replicas_with_precomputed_distribution(tensors, self._group, self._distribution)

    @staticmethod
    def _fingerprint(tensors: dict[str, Any]) -> str:
        return sha256_of_json(sorted(str(leaf.without_data()) for leaf in leaves(tensors)))


def check_coverage(everywhere: list[list[ShardedTensor]]) -> None:
    """Every element of every logical tensor has exactly one main replica.

    Raises:
        CheckpointError: it has none or several; an error of whoever named and placed the tensors.
    """
    try:
        validate_sharding_integrity(everywhere)
    except (CheckpointingException, AssertionError) as error:
        raise CheckpointError(
            f"the tensors of this model do not cover themselves exactly once ({error}): every piece must have one "
            "main replica over all ranks; correct the sharded_state_dict of the module that it names"
        ) from error


def plan_save(tensors: dict[str, Any], directory: Path) -> tuple[ShardWriter, Metadata | None]:
    """Agree on which rank writes what and stage it; collective over the default process group.

    tensors: flat or nested dict whose leaves are ShardedTensors (factories already applied).

    Returns: this rank's writer and, on rank 0, upstream's description of the whole.
    """
    flat, _, _ = _replace_state_dict_keys_with_sharded_keys(tensors, keep_only_main_replica=True)
    planned = save_state_dict_async_plan(
        mcore_to_pyt_state_dict(flat, is_loading=False),
        ShardWriter(str(directory)),
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
    )
    writer, metadata, _ = planned[0]
    return writer, metadata


def write_index(directory: Path, metadata: Metadata, reports: list[dict[str, Any]]) -> list[FileRecord]:
    """Write the files that describe the tensors, ours and upstream's, on one rank; their records.

    reports: what `ShardWriter.write` returned, by rank.
    """
    results, places = [], {}
    for report in reports:
        (name, _, _) = report["files"][0] if report["files"] else ("", 0, "")
        for key, offset, start, length, data_start, checksum in report["pieces"]:
            places[key, tuple(offset)] = [name, start, length, data_start, checksum]
            info = _StorageInfo(name, start, length)
            results.append(WriteResult(MetadataIndex(key, offset), length, info))
    table = {
        key: {
            "dtype": str(tensor.properties.dtype).removeprefix("torch."),
            "shape": list(tensor.size),
            "pieces": [
                [list(chunk.offsets), list(chunk.sizes), *places[key, tuple(chunk.offsets)]]
                for chunk in tensor.chunks
            ],
        }
        for key, tensor in metadata.state_dict_metadata.items()
    }
    record = write_durably(directory / TABLE_NAME, json.dumps(table, sort_keys=True).encode())
    FileSystemWriterAsync(str(directory)).finish(metadata, [results])
    TorchCommonSaveStrategy("torch", 1).save_common({}, str(directory))
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))
    return [record, *(_flushed_record(directory / name) for name in _UPSTREAM_NAMES)]


def _flushed_record(path: Path) -> FileRecord:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
        content = stream.read()
    return FileRecord(path.name, len(content), hashlib.sha256(content).hexdigest())
