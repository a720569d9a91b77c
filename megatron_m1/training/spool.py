"""The run's record: an append-only file of JSON lines, the truth behind MLflow and every plot.

Rule of lives. Nothing is ever cut from the file. Each process that opens it starts a new life with one line
that says from which step it resumed; that line makes all earlier lines of later steps void, and readers keep
what is left. What a sink has sent, and where to, is not known here.
"""

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)

RECORD_FILE_NAME = "metrics.jsonl"
Kind = Literal["life", "step", "evaluation", "file", "end"]
_NON_FINITE = ("NaN", "Infinity", "-Infinity")
_LIFE_PREFIX = b'{"kind": "life"'
_TAIL_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Line:
    """One complete line of the record."""

    values: dict[str, Any] | None
    """Parsed object, or None where a crash left bytes that are not one."""
    end_offset: int
    """Byte offset of the next line."""


class Spool:
    """The one writer of a run's record; lives on one rank and belongs to the thread that trains.

    A line is in the kernel when `append` returns, so it survives the death of the process. It is on the disk
    after `sync`, which the trainer calls with each checkpoint: the lines that a dead machine may lose are
    then exactly lines of steps that the next life takes again.
    """

    def __init__(
        self, directory: Path, resume_from_step: int | None, description: Mapping[str, Any] | None = None
    ) -> None:
        """Open the record in `directory` and start a life; `resume_from_step` None starts the run afresh.

        `description` (strings and flat mappings of strings) goes into the line that starts the life, so that
        the record can be sent to a server by a process that knows nothing else of the run.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / RECORD_FILE_NAME
        self.life = _last_life(self.path) + 1
        self.num_dropped_lines = 0
        self._line_is_torn = not _ends_with_newline(self.path)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.life_offset = os.fstat(self._descriptor).st_size
        start = {"is_fresh": resume_from_step is None, "process_id": os.getpid(), **(description or {})}
        self.append("life", resume_from_step or 0, start)

    def append(self, kind: Kind, step: int, values: Mapping[str, Any]) -> None:
        """Write one line. A full or broken disk drops the line, says so, and never stops the training."""
        time_ms = time.time_ns() // 1_000_000
        record = {"kind": kind, "life": self.life, "step": step, "time_ms": time_ms, **values}
        if self.num_dropped_lines:
            record["spool_dropped_lines"] = self.num_dropped_lines
        text = json.dumps({key: _encoded(value) for key, value in record.items()}, allow_nan=False)
        prefix = "\n" if self._line_is_torn else ""
        unwritten = memoryview(f"{prefix}{text}\n".encode())
        try:
            while unwritten:
                unwritten = unwritten[os.write(self._descriptor, unwritten) :]
                self._line_is_torn = len(unwritten) > 0
        except OSError as error:
            self.num_dropped_lines += 1
            if self.num_dropped_lines & (self.num_dropped_lines - 1) == 0:
                logger.error(
                    "metrics line of step %d not written to %s: %s (%d lines lost so far)",
                    step, self.path, error, self.num_dropped_lines,
                )  # fmt: skip

    def sync(self) -> None:
        """Put every line on the disk; call it with each checkpoint."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            logger.error("metrics in %s may not be on the disk: %s", self.path, error)

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        os.close(self._descriptor)


def read_lines(path: Path, offset: int = 0) -> Iterator[Line]:
    """Complete lines from byte `offset` on; an unfinished last line is left for the next call."""
    with path.open("rb") as file:
        file.seek(offset)
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            offset += len(raw)
            yield Line(_decoded(raw), offset)


def read_lives(path: Path) -> list[Line]:
    """The lines that start lives; parses no other line, so a long record is read at the speed of its "
    "bytes."""
    lives = []
    offset = 0
    with path.open("rb") as file:
        for raw in file:
            offset += len(raw)
            values = _decoded(raw) if raw.startswith(_LIFE_PREFIX) else None
            if values is not None and raw.endswith(b"\n"):
                lives.append(Line(values, offset))
    return lives


def read_steps(path: Path, kind: Kind = "step") -> dict[int, dict[str, Any]]:
    """The run's history by step: of each step the last life that reached it, without what a resume made void.

    Two lines of one kind for one step in one life are merged, the later winning.
    """
    history: dict[int, dict[str, Any]] = {}
    for line in read_lines(path):
        if line.values is None:
            continue
        step = line.values["step"]
        if line.values["kind"] == "life":
            history = {known: values for known, values in history.items() if known <= step}
        elif line.values["kind"] == kind:
            history[step] = history.get(step, {}) | line.values
    return history


def _encoded(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become their names, which `float()` reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def _decoded(raw: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(raw)
    except ValueError:
        return None
    if not isinstance(values, dict) or not {"kind", "life", "step", "time_ms"} <= values.keys():
        return None
    return {key: float(value) if value in _NON_FINITE else value for key, value in values.items()}


def _ends_with_newline(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return True
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _last_life(path: Path) -> int:
    """Life of the last readable line, -1 when there is none; reads from the end, not the whole file."""
    num_bytes = path.stat().st_size if path.exists() else 0
    tail_bytes = min(_TAIL_BYTES, num_bytes)
    while num_bytes:
        with path.open("rb") as file:
            file.seek(num_bytes - tail_bytes)
            tail = file.read(tail_bytes)
        for raw in reversed(tail.splitlines()):
            values = _decoded(raw)
            if values is not None:
                return values["life"]
        if tail_bytes == num_bytes:
            return -1
        tail_bytes = min(2 * tail_bytes, num_bytes)
    return -1
