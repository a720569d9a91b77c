"""What a checkpoint is on disk: directory names, the manifest, publishing, listing, cleaning. No tensor, no
process group.

`step_00000100/` counts only when its `manifest.json` is whole and every file that it lists has the listed
size. While it is written it is called `step_00000100.partial-<token>/`; anything with `.partial-` in its name
is garbage of a dead save or of an interrupted removal, and nobody ever reads it. `.replaced-` is the one
moment in which a second checkpoint of the same step takes the place of the first.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 2
_STEP_NAME = re.compile(r"step_(\d{8,})")
_PARTIAL = ".partial-"
_REPLACED = ".replaced-"
_READ_BYTES = 1 << 22
_TIMELINE_NAME = "timeline"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says what, the value, what is allowed, what to do."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a checkpoint: name inside its directory, size, content hash."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The truth about one checkpoint. JSON on disk, with a hash of itself."""

    step: int
    files: tuple[FileRecord, ...]
    tensors_sha256: str
    """Hash of the logical tensor table (name, dtype, global shape): equal across layouts of one model."""
    layout: dict[str, Any]
    """Sizes of the parallel axes it was saved under; informative, a load under any layout is allowed."""
    versions: dict[str, str]
    extra: dict[str, Any]
    """What the trainer keeps with the tensors: schedule, data position, random state, run ids, resolved run file."""

    @property
    def total_bytes(self) -> int:
        """Size of all files."""
        return sum(record.bytes for record in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One checkpoint directory as found on disk."""

    step: int
    path: Path
    problem: str
    """Why it is not complete; empty when it is."""
    bytes: int

    @property
    def complete(self) -> bool:
        """Whether it may be resumed from."""
        return not self.problem


def step_path(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies once it is published."""
    return root / f"step_{step:08d}"


def partial_path(root: Path, step: int, token: str) -> Path:
    """Where the checkpoint of `step` is written, or removed; `token` makes it unique."""
    return root / f"step_{step:08d}{_PARTIAL}{token}"


def sha256_of(path: Path) -> str:
    """Content hash of a file, in pieces of 4 MiB."""
    digest = hashlib.sha256()
    buffer = bytearray(_READ_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def write_durably(path: Path, content: bytes) -> FileRecord:
    """Write a whole file so that it is there completely or not at all, even after a power failure."""
    waiting = path.with_name(path.name + ".tmp")
    with waiting.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(waiting, path)
    sync_directory(path.parent)
    return FileRecord(path.name, len(content), hashlib.sha256(content).hexdigest())


def sync_directory(directory: Path) -> None:
    """Make renames and new names in a directory survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def canonical_json(value: Any) -> bytes:
    """The one byte string that stands for a JSON value; what hashes are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sha256_of_json(value: Any) -> str:
    """Hash of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Make `directory` complete: its manifest is the last file, and it appears at once."""
    body = {"format": FORMAT_VERSION, **asdict(manifest)}
    document = {"manifest": body, "sha256": sha256_of_json(body)}
    write_durably(directory / MANIFEST_NAME, json.dumps(document, indent=1, sort_keys=True).encode())


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of one checkpoint directory.

    Raises:
        CheckpointError: it is missing, is not JSON, does not match its own hash, or has another format
        version.
    """
    path = directory / MANIFEST_NAME
    try:
        document = json.loads(path.read_bytes())
        body = document["manifest"]
        intact = sha256_of_json(body) == document["sha256"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} has no {MANIFEST_NAME}: its save did not finish, and only a checkpoint with a whole "
            "manifest may be loaded; choose another step of this run (`m1 ckpt ls` lists them)"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(_corrupted(path, f"{type(error).__name__}: {error}")) from error
    if not intact:
        raise CheckpointError(_corrupted(path, "its content does not match the hash inside it"))
    if body["format"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {body['format']}: this version reads format {FORMAT_VERSION}; "
            "load it with the version that wrote it (its manifest names it)"
        )
    fields = {name: body[name] for name in ("step", "tensors_sha256", "layout", "versions", "extra")}
    return Manifest(files=tuple(FileRecord(**record) for record in body["files"]), **fields)


def _corrupted(path: Path, detail: str) -> str:
    return (
        f"{path} is corrupted ({detail}): a manifest must be exactly as it was written; "
        "restore it from a copy, or choose another step of this run"
    )


def wrong_file(directory: Path, record: FileRecord, *, hashed: bool) -> str:
    """What is wrong with one listed file, as a complete message; empty when it is as it was written."""
    path = directory / record.name
    try:
        found_bytes = path.stat().st_size
    except FileNotFoundError:
        return (
            f"{path} is missing: the manifest lists it with {record.bytes} bytes; "
            "restore it from a copy, or choose another step of this run"
        )
    if found_bytes != record.bytes:
        return (
            f"{path} has {found_bytes} bytes: the manifest lists {record.bytes}, so it was cut or overwritten; "
            "restore it from a copy, or choose another step of this run"
        )
    if hashed and (found := sha256_of(path)) != record.sha256:
        return (
            f"{path} has sha256 {found[:16]}...: the manifest lists {record.sha256[:16]}..., so its content has "
            "changed since it was written; restore it from a copy, or choose another step of this run"
        )
    return ""


def check_files(directory: Path, records: Iterable[FileRecord], *, hashed: bool) -> None:
    """Refuse a directory with a missing, cut or changed file.

    Raises:
        CheckpointError: naming the first such file, with what was found and what the manifest lists.
    """
    for record in records:
        if problem := wrong_file(directory, record, hashed=hashed):
            raise CheckpointError(problem)


def list_checkpoints(root: Path) -> list[Entry]:
    """Every checkpoint directory under `root` by ascending step, complete or not; sizes are checked, hashes are not."""
    entries = []
    for path in root.iterdir() if root.is_dir() else ():
        match = _STEP_NAME.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        problem, total_bytes = "", 0
        try:
            manifest = read_manifest(path)
            total_bytes = manifest.total_bytes
            check_files(path, manifest.files, hashed=False)
        except CheckpointError as error:
            problem = str(error)
        entries.append(Entry(step=int(match.group(1)), path=path, problem=problem, bytes=total_bytes))
    return sorted(entries, key=lambda entry: entry.step)


def publish(partial: Path, root: Path, step: int) -> Path:
    """Give a finished directory its final name, in one rename. An older checkpoint of the same step makes way."""
    final = step_path(root, step)
    old = partial.with_name(partial.name.replace(_PARTIAL, _REPLACED))
    if final.exists():
        os.rename(final, old)
    os.rename(partial, final)
    sync_directory(root)
    shutil.rmtree(old, ignore_errors=True)
    return final


def remove(root: Path, step: int, token: str) -> None:
    """Delete one checkpoint. It stops counting in one rename, so a crash never leaves half of it under its name."""
    doomed = partial_path(root, step, token)
    os.rename(step_path(root, step), doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def timeline(root: Path) -> str:
    """Token of the way a run has taken: it changes when the run goes back, and voids copies kept elsewhere."""
    path = root / _TIMELINE_NAME
    if not path.exists():
        write_durably(path, secrets.token_hex(8).encode())
    return path.read_text()


def end_timeline(root: Path) -> None:
    """The run goes back: what was saved on this way must not be resumed from any more."""
    (root / _TIMELINE_NAME).unlink(missing_ok=True)


def set_aside(root: Path, from_step: int) -> list[int]:
    """Take the checkpoints of a step and of all later ones out of the run; they stay as `step_....broken`.

    Returns: their steps.
    """
    end_timeline(root)
    doomed = [entry for entry in list_checkpoints(root) if entry.step >= from_step]
    for entry in doomed:
        aside = entry.path.with_name(f"{entry.path.name}.broken")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(entry.path, aside)
    sync_directory(root)
    return [entry.step for entry in doomed]


def clean(root: Path) -> list[str]:
    """Delete what dead saves and interrupted removals left behind; the names of what was deleted.

    A checkpoint that was being replaced when the process died gets its name back, unless the new one has it
    already.
    """
    for path in root.glob(f"step_*{_REPLACED}*"):
        final = root / path.name.partition(_REPLACED)[0]
        os.rename(
            path, final if not final.exists() else path.with_name(path.name.replace(_REPLACED, _PARTIAL))
        )
    garbage = list(root.glob(f"step_*{_PARTIAL}*"))
    for path in garbage:
        shutil.rmtree(path, ignore_errors=True)
    return sorted(path.name for path in garbage)
