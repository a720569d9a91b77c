"""The documents inside one part of a corpus: JSON lines, Parquet or text files, read as a stream.

Damage is an error that names the file and the place. What is merely no document (empty, not text) is
counted and left out.
"""

import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow

from data_pipeline.parts import Part, ReadError, damaged, format_of, open_parquet

READ_ROWS = 256
EMPTY = "empty"
NOT_TEXT = "not UTF-8 text"


def documents_of(part: Part, text_field: str, dropped: Counter[str]) -> Iterator[str]:
    """The texts of a part in file order; what cannot be a document is counted in `dropped` by reason.

    Raises:
        ReadError: a damaged file, a line that is not a JSON object, or a record without `text_field`.
    """
    for content in _contents_of(part, text_field):
        text = decode_text(content)
        if text is None:
            dropped[NOT_TEXT] += 1
        elif not text.strip():
            dropped[EMPTY] += 1
        else:
            yield text


def _contents_of(part: Part, text_field: str) -> Iterator[bytes]:
    if part.format == "text":
        return (_whole_text(file) for file in part.files)
    read = _parquet_values if part.format == "parquet" else _json_values
    return read(part, text_field)


def decode_text(content: bytes) -> str | None:
    """The text of UTF-8 bytes, or None when they are none: wrong bytes, or a zero byte as in binary files."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def _whole_text(file: Path) -> bytes:
    try:
        with open_stream(file) as stream:
            return stream.read()
    except OSError as error:
        raise damaged(file, 0, error) from error


def open_stream(file: Path) -> BinaryIO:
    """The file's content from the start, decompressed when its name says that it is compressed."""
    compression = format_of(file)[1]
    if compression is None:
        return open(file, "rb")
    # pyarrow's file object lacks parts of the type, not of the behaviour.
    return io.BufferedReader(pyarrow.input_stream(str(file), compression=compression))


def _json_values(part: Part, text_field: str) -> Iterator[bytes]:
    """The text field of each line that begins in the part's range."""
    (file,) = part.files
    position = 0
    try:
        with open_stream(file) as stream:
            if part.start:
                # The line that holds the byte before the range belongs to the range before.
                stream.seek(part.start - 1)
                position = part.start - 1 + len(stream.readline())
            while (not part.end or position < part.end) and (line := stream.readline()):
                if line.strip():
                    yield _text_of_record(line, text_field, file, position)
                position += len(line)
    except OSError as error:
        raise damaged(file, position, error) from error


def _text_of_record(line: bytes, text_field: str, file: Path, position: int) -> bytes:
    """The text of one JSON line; a null is empty, and a surrogate without its pair is no text."""
    try:
        # Decoded here: json would guess UTF-16 from zero bytes.
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise damaged(file, position, error) from error
    if not isinstance(record, dict) or not isinstance(record.get(text_field, 0), str | None):
        fields = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ReadError(
            f"input '{file}' at byte {position}: the record {fields} has no text in '{text_field}'; each line is "
            "a JSON object with that field; name the field that holds the text"
        )
    return (record[text_field] or "").encode("utf-8", "surrogatepass")


def _parquet_values(part: Part, text_field: str) -> Iterator[bytes]:
    """The text column of the part's row groups."""
    (file,) = part.files
    parquet = open_parquet(file)
    columns = parquet.schema_arrow
    types = (pyarrow.string(), pyarrow.large_string())
    if text_field not in columns.names or columns.field(text_field).type not in types:
        raise ReadError(
            f"input '{file}': the columns {columns.names} have no text in '{text_field}'; it is a column of "
            "strings; name the column that holds the text"
        )
    groups = list(range(part.start, part.end))
    num_rows = sum(parquet.metadata.row_group(group).num_rows for group in groups)
    row = 0
    try:
        for batch in parquet.iter_batches(READ_ROWS, row_groups=groups, columns=[text_field]):
            # As bytes, because the file may claim to hold UTF-8 that it does not hold.
            for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                yield value or b""
                row += 1
        # A damaged page can end a column early without an error of the library.
        if row != num_rows:
            raise ValueError(f"{row} of {num_rows} rows")
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise damaged(file, row, error) from error
