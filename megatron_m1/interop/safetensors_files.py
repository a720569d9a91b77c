"""A directory of safetensors shards: reads slices of its tensors, writes tensors one run of rows at a time.

Reading goes through the safetensors package. Writing is ours because the package needs a whole shard in
memory: a file is 8 bytes of header length, a JSON header (dtype, shape, byte range per tensor), the bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_CODES = {dtype: code for code, dtype in STORED_DTYPES.items()}


class ShardReader:
    """Random access to every tensor of a checkpoint directory; maps each file once and reads nothing yet.

    Raises:
        ValueError: no checkpoint there, a file missing or damaged, or weights in a quantised dtype.
    """

    def __init__(self, directory: Path) -> None:
        self._file_of: dict[str, Any] = {}
        for file, names in _files(directory).items():
            opened = _open(file)
            for name in names if names is not None else opened.keys():
                self._file_of[name] = opened
            absent = set(names or ()) - set(opened.keys())
            if absent:
                raise ValueError(
                    f"{file} lacks {len(absent)} tensors that {INDEX_FILE} places there, first "
                    f"{min(absent)}: "
                    "the index and the files must be of one checkpoint; download the directory again"
                )

    def names(self) -> set[str]:
        """Every tensor of the checkpoint."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor as stored."""
        code = self._file_of[name].get_slice(name).get_dtype()
        if code not in STORED_DTYPES:
            raise ValueError(
                f"tensor {name} is stored as {code}: weights must be one of {sorted(STORED_DTYPES)}; "
                "quantised checkpoints cannot be trained, take the unquantised one"
            )
        return STORED_DTYPES[code]

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """One box of one tensor, in the stored dtype, on the CPU."""
        return self._file_of[name].get_slice(name)[index]


def _files(directory: Path) -> dict[Path, list[str] | None]:
    """Files of a checkpoint and the tensors the index places in each (None: whatever is in the one file)."""
    if (directory / INDEX_FILE).is_file():
        files: dict[Path, list[str] | None] = {}
        for name, file in json.loads((directory / INDEX_FILE).read_text())["weight_map"].items():
            names = files.setdefault(directory / file, [])
            assert names is not None, f"{file} listed twice"
            names.append(name)
        return files
    if (directory / SINGLE_FILE).is_file():
        return {directory / SINGLE_FILE: None}
    raise ValueError(
        f"{directory} holds no checkpoint: {INDEX_FILE} or {SINGLE_FILE} must be there; give the directory "
        "that "
        "holds config.json and the .safetensors files"
    )


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}): every file of the index must be whole; download it again"
        ) from error


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Header entry of a tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def plan_shards(tensors: list[StoredTensor], shard_bytes: int) -> dict[str, list[StoredTensor]]:
    """File name -> its tensors, in the given order, up to `shard_bytes` a file (a larger tensor alone).

    Inside a file wide dtypes come first, so that every tensor begins at a multiple of its element's bytes.
    """
    shards: list[list[StoredTensor]] = [[]]
    filled_bytes = 0
    for tensor in tensors:
        if shards[-1] and filled_bytes + tensor.num_bytes > shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(tensor)
        filled_bytes += tensor.num_bytes
    for shard in shards:
        shard.sort(key=lambda tensor: -tensor.dtype.itemsize)
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_index(directory: Path, shards: dict[str, list[StoredTensor]]) -> None:
    """Write the index of a checkpoint of several files: the last act of an export."""
    tensors = [(file, tensor) for file, shard in shards.items() for tensor in shard]
    index = {
        "metadata": {"total_size": sum(tensor.num_bytes for _, tensor in tensors)},
        "weight_map": {tensor.name: file for file, tensor in tensors},
    }
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


class ShardWriter:
    """Writes one file, its tensors in the planned order, each in as many runs of rows as the caller likes.

    Inside `with`; the file has its final name only when it is whole.
    """

    def __init__(self, path: Path, tensors: list[StoredTensor]) -> None:
        self._path, self._partial = path, path.with_name(path.name + ".partial")
        self._expected_bytes = sum(tensor.num_bytes for tensor in tensors)
        self._written_bytes = 0
        self._header = _header(tensors)

    def __enter__(self) -> ShardWriter:
        self._file = self._partial.open("wb")
        self._file.write(self._header)
        return self

    def append(self, rows: torch.Tensor) -> None:
        """Write the next bytes: a contiguous CPU tensor in the planned dtype."""
        self._written_bytes += self._file.write(memoryview(rows.view(torch.uint8).numpy()).cast("B"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            assert self._written_bytes == self._expected_bytes, (
                f"{self._path.name}: {self._written_bytes} bytes written, {self._expected_bytes} planned"
            )
            self._partial.rename(self._path)


def _header(tensors: list[StoredTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for tensor, (start, stop) in zip(tensors, _byte_ranges(tensors), strict=True):
        entries[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    # the data begin at a multiple of 8 bytes, as the package's own files do
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _byte_ranges(tensors: list[StoredTensor]) -> Iterator[tuple[int, int]]:
    start = 0
    for tensor in tensors:
        yield start, start + tensor.num_bytes
        start += tensor.num_bytes
