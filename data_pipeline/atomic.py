"""Files that appear whole or not at all: write under a temporary name, flush to the disk, rename.

Also the content hash by which a finished file is recognised, and the lock of whoever writes. Nothing here
knows what the files hold.
"""

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL_SUFFIX = ".partial"
"""What a file under construction is called; a killed run leaves at most files with this ending."""

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR})
"""What a user can mend: no room, no permission, no directory."""


def partial_path(path: Path) -> Path:
    """The temporary name under which `path` is written."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def publish(path: Path) -> None:
    """Rename the flushed temporary file of `path` to `path` and flush the directory entry."""
    os.replace(partial_path(path), path)
    flush_directory(path.parent)


def flush_directory(directory: Path) -> None:
    """Make renames and removals in `directory` survive a power loss."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never a part."""
    with open(partial_path(path), "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    publish(path)


def file_hash(path: Path) -> str:
    """SHA-256 of the file's content, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def only_process(lock_path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process: a second run, or what is left of a killed one, waits."""
    with open(lock_path, "wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def writing_to(directory: Path) -> Iterator[None]:
    """Turn a disk that is full or may not be written into a user's mistake, also one that a job met.

    Raises:
        ValueError: names the directory and what to do. Other errors pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise ValueError(
            f"directory '{directory}' cannot be written ({error}): it needs room and must be writable for this user; "
            "make room or name another place, then run the command again (finished parts are kept)"
        ) from error
