"""What the ranks of the failure tests do: damage, full disks, dead writers, dead ranks."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from parallel import checkpoint, cpu, manifest, shards
from parallel.checkpoint import CheckpointError, CheckpointStore
from parallel.checkpoint_config import CheckpointConfig
from parallel.groups import Groups, create_groups
from parallel.launch import Launch, connect
from parallel.layout import Layout
from tests.spawn import run_ranks

ROWS = 4096


def state_of(value: float, rows: int = ROWS) -> dict[str, Any]:
    """One tensor in two halves over the ranks and one that rank 0 has; 64 KiB per rank at 4096 rows."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    data = torch.full((rows, 4), value) + rank
    return {
        "table": ShardedTensor.from_rank_offsets("table", data, (0, rank, ranks)),
        "bias": ShardedTensor.from_rank_offsets("bias", torch.full((3,), value), replica_id=rank),
    }


def groups_of_all() -> Groups:
    return create_groups(Layout(dp=dist.get_world_size()), torch.device("cpu"))


def open_store(directory: Path | str, groups: Groups, **options: Any) -> CheckpointStore:
    return CheckpointStore(Path(directory), CheckpointConfig(**options), groups)


def error_of(action: Callable[[], Any]) -> str:
    """The message of the CheckpointError that an action raises on this rank; empty when it raises none."""
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return ""


def loads(store: CheckpointStore, step: int) -> float:
    """The value that a checkpoint of `state_of` holds, after checking all of it."""
    state, _ = store.load(step, state_of(-1.0))
    value = float(state["bias"][0])
    assert torch.equal(state["table"], torch.full_like(state["table"], value) + dist.get_rank()), state[
        "table"
    ]
    return value


@contextmanager
def replaced(owner: Any, name: str, value: Any):
    """An attribute replaced for a while, inherited by forked writers."""
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def failures_of_two(directory: str) -> dict[str, Any]:
    """Every failure that leaves both ranks alive; this rank's messages."""
    groups, root = groups_of_all(), Path(directory)
    found: dict[str, Any] = {}
    found |= _damaged_files(root / "damage", groups)
    found |= _misfits(root / "misfit", groups)
    found |= _writers(root / "writers", groups)
    found["retention"] = _retention(root / "retention", groups)
    blocked = root / "a file"
    if dist.get_rank() == 0:
        blocked.write_text("in the way")
    dist.barrier()
    found["not a directory"] = error_of(lambda: open_store(blocked / "checkpoints", groups))
    return found


def disks_of_two(small_disk: str, read_only: str) -> dict[str, Any]:
    """What a disk of 4 MiB and a read-only one do to a store; this rank's messages."""
    groups = groups_of_all()
    found = _full_disk(Path(small_disk), groups)
    found["read-only"] = error_of(lambda: open_store(Path(read_only) / "checkpoints", groups))
    return found


def failures_of_disks(directory: str) -> list[dict[str, Any]]:
    """Mount both disks, which needs a mount namespace of this process's own: they end with it, however it ends."""
    # this file's functions by the name that the ranks import, which is not __main__
    ranks = importlib.import_module("tests.parallel.checkpoint_failures")
    places = Path(directory) / "small", Path(directory) / "read-only"
    for place, options in zip(places, ("size=4m", "size=1m,ro"), strict=True):
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)
    return run_ranks(2, ranks.disks_of_two, *map(str, places))


def _damaged_files(root: Path, groups: Groups) -> dict[str, Any]:
    store = open_store(root, groups, asynchronous=False, keep=0)
    for step in (1, 2):
        store.save(step, state_of(float(step)), {})
    path, kept = root / "step_00000002", root / "kept"
    damages: dict[str, Callable[[], Any]] = {
        "truncated": lambda: os.truncate(path / "__1_0.distcp", 1000),
        "missing": lambda: (path / "__1_0.distcp").unlink(),
        "flipped": lambda: _flip_one_bit(path / "__1_0.distcp"),
        "manifest": lambda: _flip_one_bit(path / "manifest.json"),
        "manifest not json": lambda: (path / "manifest.json").write_text('{"manifest": 1'),
        "no manifest": lambda: (path / "manifest.json").unlink(),
        "table": lambda: _flip_one_bit(path / "tensors.json"),
    }
    found = {}
    for name, damage in damages.items():
        if dist.get_rank() == 0:
            shutil.copytree(path, kept)
            damage()
        dist.barrier()
        found[name] = error_of(lambda: store.load(2, state_of(-1.0)))
        found[f"{name}: newest"] = store.newest_complete()
        found[f"{name}: previous"] = loads(store, 1)
        if dist.get_rank() == 0:
            shutil.rmtree(path)
            kept.rename(path)
        dist.barrier()
    found["repaired"] = loads(store, 2)
    return found


def _flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class _Bomb:
    def __reduce__(self) -> Any:
        return os.system, (f"touch {_Bomb.mark}",)

    mark = ""


def _misfits(root: Path, groups: Groups) -> dict[str, Any]:
    store = open_store(root, groups, asynchronous=False)
    store.save(1, state_of(1.0), {})
    other = ShardedTensor.from_rank_offsets("other", torch.zeros(2), replica_id=dist.get_rank())
    half = ShardedTensor.from_rank_offsets("bias", torch.zeros(3).half(), replica_id=dist.get_rank())
    part = {"bias": state_of(0.0)["bias"]}
    found: dict[str, Any] = {
        "missing tensor": error_of(lambda: store.load(1, state_of(0.0) | {"other": other})),
        "unexpected tensor": error_of(lambda: store.load(1, part)),
        "other shape": error_of(lambda: store.load(1, state_of(0.0, rows=8))),
        "other dtype": error_of(lambda: store.load(1, state_of(0.0) | {"bias": half})),
        "ignored": float(store.load(1, part, ignore=("tab",))[0]["bias"][0]),
        "no such step": error_of(lambda: store.load(7, part)),
        "an object": error_of(lambda: store.save(2, {"x": ShardedObject("x", {1}, (1,), (0,))}, {})),
        "twice": error_of(
            lambda: store.save(2, {"x": ShardedTensor.from_rank_offsets("x", torch.zeros(2))}, {})
        ),
        "not json": error_of(lambda: store.save(2, state_of(0.0), {"x": float("nan")})),
        "on one rank": error_of(lambda: store.save(2, {} if dist.get_rank() else {"x": 3}, {})),
    }
    if dist.get_rank() == 0:
        _Bomb.mark = str(root / "exploded")
        for name in (".metadata", "common.pt"):
            path = root / "step_00000001" / name
            path.write_bytes(pickle.dumps(_Bomb()))
        _list_again(root / "step_00000001")
    dist.barrier()
    found["with a bomb"] = loads(store, 1)
    found["exploded"] = (root / "exploded").exists()
    return found


def _list_again(path: Path) -> None:
    """Make a manifest that vouches for the files as they are now, as an attacker would."""
    old = manifest.read_manifest(path)
    files = tuple(
        manifest.FileRecord(
            record.name, (path / record.name).stat().st_size, manifest.sha256_of(path / record.name)
        )
        for record in old.files
    )
    manifest.write_manifest(path, checkpoint.Manifest(**{**_fields(old), "files": files}))


def _fields(old: checkpoint.Manifest) -> dict[str, Any]:
    return {name: getattr(old, name) for name in ("step", "tensors_sha256", "layout", "versions", "extra")}


def _writers(root: Path, groups: Groups) -> dict[str, Any]:
    """Writers that die, hang or are slow; then one that works."""
    found: dict[str, Any] = {}
    store = open_store(root, groups, writer_timeout_s=1.0)
    write, rank = shards.ShardWriter.write, dist.get_rank()

    def dies(writer: shards.ShardWriter, directory: Path) -> dict[str, Any]:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(writer, directory)

    def hangs(writer: shards.ShardWriter, directory: Path) -> dict[str, Any]:
        time.sleep(60.0 if rank == 1 else 0.0)
        return write(writer, directory)

    for name, behaviour in (("killed writer", dies), ("hanging writer", hangs)):
        with replaced(shards.ShardWriter, "write", behaviour):
            store.save(1, state_of(1.0), {})
            found[name] = error_of(store.wait)
        found[f"{name}: left"] = sorted(path.name for path in root.iterdir())

    def slow(writer: shards.ShardWriter, directory: Path) -> dict[str, Any]:
        time.sleep(0.5 * rank)
        return write(writer, directory)

    with replaced(shards.ShardWriter, "write", slow):
        state = state_of(2.0)
        store.save(2, state, {})
        state["table"].data.zero_()
        found["first poll"] = store.poll()
        started = time.monotonic()
        store.save(3, state_of(3.0), {})
        found["back-pressure s"] = time.monotonic() - started
        found["published by the next save"] = [entry.step for entry in store.entries()]
        found["wait"] = store.wait()
        found["wait again"] = store.wait()
    found["values"] = [loads(store, 2), loads(store, 3)]
    return found


def _retention(root: Path, groups: Groups) -> list[list[int]]:
    seen = []
    store = open_store(root, groups, asynchronous=False, keep=2)
    for step in (10, 20, 30, 30):
        store.save(step, state_of(float(step)), {})
        seen.append([entry.step for entry in store.entries()])
    assert loads(store, 30) == 30.0
    seen.append(sorted(path.name for path in root.iterdir()))
    return seen


def _full_disk(root: Path, groups: Groups) -> dict[str, Any]:
    """A tmpfs of 4 MiB: saves of 1 MiB fit, 8 MiB do not."""
    found: dict[str, Any] = {}
    large = 8 * ROWS * 8
    for name, asynchronous in (("full disk", False), ("full disk, background", True)):
        store = open_store(root / name, groups, asynchronous=asynchronous)
        store.save(1, state_of(1.0, rows=2 * ROWS), {})
        store.wait()
        found[f"{name}: seen before"] = error_of(
            lambda store=store: store.save(2, state_of(2.0, rows=large), {})
        )
        free_bytes = iter([1 << 40])
        real = checkpoint._free_bytes
        with replaced(
            checkpoint, "_free_bytes", lambda place, fake=free_bytes, real=real: next(fake, real(place))
        ):
            # the disk fills up between the check and the write: here the check alone sees a free one
            found[name] = error_of(
                lambda store=store: (store.save(2, state_of(2.0, rows=large), {}), store.wait())
            )
        found[f"{name}: left"] = sorted(path.name for path in (root / name).iterdir())
        found[f"{name}: previous"] = float(
            store.load(store.newest_complete() or -1, state_of(0.0, rows=2 * ROWS))[0]["bias"][0]
        )
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(root / name)
        dist.barrier()
    return found


def die_during_a_background_save(directory: str, delay_s: float) -> None:
    """Save step 1, start saving step 2 with a slow writer, and SIGKILL every rank `delay_s` later."""
    _die_in_a_background_save(open_store(directory, groups_of_all()), delay_s)


def resume_after_death(directory: str) -> dict[str, Any]:
    groups = groups_of_all()
    before = sorted(path.name for path in Path(directory).glob("step_*"))
    dist.barrier()
    store = open_store(directory, groups)
    store.clean()
    newest = store.newest_complete()
    return {
        "before": before,
        "newest": newest,
        "value": loads(store, newest or -1),
        "after": sorted(path.name for path in Path(directory).glob("step_*")),
    }


def crash_points(directory: str, kept: int) -> list[dict[str, Any]]:
    """Kill a foreground save of step 2 before each of its file operations in turn; what a new start finds.

    Each run is a forked child of this process, which has no process group of its own.
    """
    cpu.install()
    found = []
    for operation in range(200):
        root = Path(directory) / f"operation{operation}"
        status = _in_child(lambda root=root, operation=operation: _save_and_die(root, operation, kept))
        outcome = json.loads(_in_child_with_answer(lambda root=root: _what_is_left(root)))
        found.append({"operation": operation, "killed": status == signal.SIGKILL, **outcome})
        if status == 0:
            return found
    raise AssertionError(f"a save of more than 200 file operations: {found[-1]}")


def kill_times(directory: str) -> list[dict[str, Any]]:
    """SIGKILL a rank at several moments of a background save; what a new start finds, and whether its writer lives."""
    cpu.install()
    found = []
    for delay_s in (0.0, 0.05, 0.15, 0.3, 0.5):
        root = Path(directory) / f"delay{delay_s}"
        status = _in_child(lambda root=root, delay_s=delay_s: _save_behind_and_die(root, delay_s))
        writer = int((root / "writer").read_text())
        time.sleep(0.3)
        state = _process_state(writer)
        outcome = json.loads(_in_child_with_answer(lambda root=root: _what_is_left(root)))
        found.append({"delay_s": delay_s, "killed": status == signal.SIGKILL, "writer": state, **outcome})
    return found


def _process_state(process: int) -> str:
    """R, S, Z and the like; empty when there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def _save_behind_and_die(root: Path, delay_s: float) -> None:
    _die_in_a_background_save(open_store(root, _alone()), delay_s)


def _die_in_a_background_save(store: CheckpointStore, delay_s: float) -> None:
    store.save(1, state_of(1.0), {})
    store.wait()
    write = shards._write_item

    def slow(*arguments: Any) -> Any:
        time.sleep(0.2)
        return write(*arguments)

    with replaced(shards, "_write_item", slow):
        store.save(2, state_of(2.0), {})
        assert store._flight is not None and store._flight.call._process is not None
        (store.directory / "writer").write_text(str(store._flight.call._process.pid))
        deadline = time.monotonic() + delay_s
        while time.monotonic() < deadline:
            store.poll()
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)


def _in_child(action: Callable[[], Any]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def _in_child_with_answer(action: Callable[[], Any]) -> str:
    reader, writer = os.pipe()
    status = _in_child(lambda: os.write(writer, json.dumps(action()).encode()))
    os.close(writer)
    assert status == 0, status
    with os.fdopen(reader) as stream:
        return stream.read()


def _alone() -> Groups:
    # a fork inherits this process's generator: every child must pick a port of its own
    connect(Launch(rank=0, world_size=1, local_rank=0, launcher="single"), timeout_s=60.0)
    return groups_of_all()


def _save_and_die(root: Path, operation: int, kept: int) -> None:
    store = open_store(root, _alone(), asynchronous=False, keep=kept)
    store.save(1, state_of(1.0), {})
    store.save(2, state_of(2.0), {})
    count = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return function(*arguments, **options)

        return call

    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "open"):
        setattr(os, name, counted(getattr(os, name)))
    store.save(2, state_of(2.5), {})
    store.save(3, state_of(3.0), {})


def _what_is_left(root: Path) -> dict[str, Any]:
    store = open_store(root, _alone())
    store.clean()
    newest = store.newest_complete()
    value = loads(store, newest or -1)
    return {"newest": newest, "value": value, "names": sorted(path.name for path in root.glob("step_*"))}


if __name__ == "__main__" and sys.argv[1] == "disks":
    print(json.dumps(failures_of_disks(sys.argv[2])))
elif __name__ == "__main__" and sys.argv[1] == "crashes":
    print(json.dumps({"operations": crash_points(sys.argv[2], kept=2), "times": kill_times(sys.argv[2])}))
