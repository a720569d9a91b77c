"""A corpus of files cut into parts of work; what is inside a part is `documents.py`.

Files may be JSON lines, Parquet, or text (one document per file), the first and last also compressed with
gzip or zstd. Large JSON-lines files are cut by bytes and Parquet files by row groups, so that many
processes can share one file; a directory stands for the files below it.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pyarrow
import pyarrow.parquet

Format = Literal["json_lines", "parquet", "text"]
COMPRESSION_OF_SUFFIX = {".gz": "gzip", ".zst": "zstd"}
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")


class ReadError(ValueError):
    """An input file that cannot be read; the message names the file and the place."""


@dataclass(frozen=True, slots=True)
class Part:
    """Work for one process: a range of one file, or several whole text files."""

    format: Format
    """How the files are read."""
    files: tuple[Path, ...]
    """One file, or several text files."""
    start: int
    """First byte (JSON lines) or row group (Parquet); 0 for whole files."""
    end: int
    """Past the last byte or row group; a line belongs to the range in which it begins."""
    num_bytes: int
    """Bytes on the disk that this part stands for."""


def format_of(path: Path) -> tuple[Format, str | None]:
    """The format and the compression that a file's name announces."""
    compression = COMPRESSION_OF_SUFFIX.get(path.suffix)
    suffix = path.with_suffix("").suffix if compression else path.suffix
    if suffix in JSON_LINES_SUFFIXES or (compression and suffix == ".json"):
        return "json_lines", compression
    if suffix == ".parquet" and not compression:
        return "parquet", None
    return "text", compression


def files_below(inputs: Sequence[Path]) -> list[Path]:
    """The given files, and in place of each directory its files in path order; no links, nothing hidden.

    Raises:
        ReadError: an input is missing, or there are no files.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_file():
            files.append(path)
            continue
        if not path.is_dir():
            raise ReadError(
                f"input '{path}' does not exist: inputs are files and directories; check the path"
            )
        found = []
        for directory, subdirectories, names in os.walk(path):
            subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
            found += [Path(directory, name) for name in names if not name.startswith(".")]
        files += sorted(file for file in found if file.is_file() and not file.is_symlink())
    if not files:
        raise ReadError(
            f"inputs {[str(path) for path in inputs]} hold no files: name at least one file or a directory "
            "with files; check the paths"
        )
    return files


def plan_parts(files: Sequence[Path], part_bytes: int) -> list[Part]:
    """Cut files into parts of about `part_bytes` bytes, in order; the same files give the same parts."""
    parts: list[Part] = []
    texts: list[Path] = []
    text_bytes = 0
    for file in files:
        format, compression = format_of(file)
        num_bytes = file.stat().st_size
        if format == "text":
            texts.append(file)
            text_bytes += num_bytes
            if text_bytes < part_bytes:
                continue
        if texts:
            parts.append(Part("text", tuple(texts), 0, 0, text_bytes))
            texts, text_bytes = [], 0
        if format == "parquet":
            parts += _row_group_parts(file, num_bytes, part_bytes)
        elif format == "json_lines" and compression:
            parts.append(Part("json_lines", (file,), 0, 0, num_bytes))
        elif format == "json_lines":
            borders = [*range(0, num_bytes, part_bytes), num_bytes]
            parts += [
                Part("json_lines", (file,), start, end, end - start) for start, end in pairwise(borders)
            ]
    if texts:
        parts.append(Part("text", tuple(texts), 0, 0, text_bytes))
    return parts


def _row_group_parts(file: Path, num_bytes: int, part_bytes: int) -> list[Part]:
    num_groups = open_parquet(file).num_row_groups
    num_parts = max(1, min(num_groups, num_bytes // part_bytes))
    borders = [num_groups * number // num_parts for number in range(num_parts + 1)]
    return [Part("parquet", (file,), start, end, num_bytes // num_parts) for start, end in pairwise(borders)]


def open_parquet(file: Path) -> pyarrow.parquet.ParquetFile:
    """Open a Parquet file.

    Raises:
        ReadError: it is damaged or of another format.
    """
    try:
        parquet = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
        metadata = parquet.metadata
        num_rows = sum(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        # The footer has no checksum; its two counts of rows must at least agree.
        if num_rows != metadata.num_rows:
            raise ValueError(f"{num_rows} rows in the row groups, {metadata.num_rows} in the file")
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise damaged(file, 0, error) from error
    return parquet


def damaged(file: Path, position: int, error: Exception) -> ReadError:
    """The error for a file whose content, from a byte or row on, is not what it should be."""
    reason = getattr(error, "strerror", None) or error
    return ReadError(
        f"input '{file}' at position {position} cannot be read ({reason}): the file must be whole and of the "
        "format its name says; repair it, or leave it out"
    )
