"""Save and load of a checkpoint against a raw write and read of the same bytes, in the same run, on the same disk.

`python -m tests.bench.checkpoint_speed DIRECTORY [MEBIBYTES]` starts two ranks and prints one row for BENCHMARKS.md.
Raw is what the file system gives one process per rank: write of one file in pieces of 16 MiB with fsync, and read
into a buffer. Reads are measured from the page cache, which is memory, and cold, which is the disk: what a start of a
run meets. Save stall is how long `save` keeps the trainer.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from parallel.checkpoint import CheckpointStore
from parallel.checkpoint_config import CheckpointConfig
from parallel.groups import create_groups
from parallel.layout import Layout
from parallel.manifest import step_path
from tests.spawn import run_ranks

RANKS, REPEATS, TENSORS, PIECE_BYTES = 2, 5, 16, 16 << 20


def measured(action: Callable[[], Any]) -> float:
    """Seconds until the slowest rank is done."""
    dist.barrier()
    started = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - started


def state_of(bytes_per_rank: int) -> dict[str, ShardedTensor]:
    rows = bytes_per_rank // TENSORS // 4 // 1024
    rank = dist.get_rank()
    return {
        f"weight{index}": ShardedTensor.from_rank_offsets(
            f"weight{index}", torch.randn(rows, 1024), (0, rank, RANKS)
        )
        for index in range(TENSORS)
    }


def write_raw(path: Path, content: torch.Tensor) -> None:
    view = memoryview(content.numpy())
    with path.open("wb", buffering=0) as stream:
        for start in range(0, len(view), PIECE_BYTES):
            stream.write(view[start : start + PIECE_BYTES])
        os.fsync(stream.fileno())


def read_raw(path: Path, buffer: torch.Tensor) -> None:
    view = memoryview(buffer.numpy())
    with path.open("rb", buffering=0) as stream:
        start = 0
        while count := stream.readinto(view[start : start + PIECE_BYTES]):
            start += count


def forget_cached(directory: Path) -> None:
    """Drop the files of a directory from the page cache; they are on the disk."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(directory: str, bytes_per_rank: int) -> dict[str, float]:
    """Median seconds of each action over the repeats, alternating so that all see the same disk."""
    root, groups = Path(directory), create_groups(Layout(dp=RANKS), torch.device("cpu"))
    options = {"keep": 1}
    store = CheckpointStore(root / "now", CheckpointConfig(asynchronous=False, **options), groups)
    behind = CheckpointStore(root / "behind", CheckpointConfig(asynchronous=True, **options), groups)
    # loaded in place, as a trainer does: memory of the bench's own would make every fork longer
    state = template = state_of(bytes_per_rank)
    raw = root / "raw" / f"rank{dist.get_rank()}"
    raw.parent.mkdir(exist_ok=True)
    content = buffer = torch.randint(0, 255, (bytes_per_rank,), dtype=torch.uint8)
    actions: dict[str, Callable[[int], Any]] = {
        "raw write": lambda step: write_raw(raw, content),
        "save": lambda step: store.save(step, state, {}),
        "save stall": lambda step: behind.save(step, state, {}),
        "save in the background": lambda step: behind.wait(),
        # after a fork the first write to each page copies it: a start of a run, which loads, has forked nothing
        "own pages": lambda step: [content.add_(0), *(leaf.data.add_(0.0) for leaf in state.values())],
        "raw read": lambda step: read_raw(raw, buffer),
        "load": lambda step: store.load(step, template),
        "load unverified": lambda step: store.load(step, template, verify=False),
        "cold raw read": lambda step: read_raw(raw, buffer),
        "cold load": lambda step: store.load(step, template),
    }
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for step in range(REPEATS + 1):
        for name, action in actions.items():
            if name.startswith("cold"):
                forget_cached(raw.parent if "raw" in name else step_path(store.directory, step))
            seconds[name].append(measured(lambda action=action, step=step: action(step)))
    # the first round warms up: it allocates buffers and checks the tensor table
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def main() -> None:
    root = Path(sys.argv[1]) / "checkpoint_speed"
    mebibytes = int(sys.argv[2]) if len(sys.argv) > 2 else 256
    root.mkdir(parents=True)
    try:
        # the ranks import this file by its name, which is not __main__ there
        named = importlib.import_module("tests.bench.checkpoint_speed").measure
        seconds = run_ranks(RANKS, named, str(root), mebibytes << 20)[0]
    finally:
        shutil.rmtree(root)
    write, read, cold = seconds["raw write"], seconds["raw read"], seconds["cold raw read"]
    cells = [
        date.today().isoformat(),
        f"{os.cpu_count()}-core {platform.machine()}, {RANKS} ranks",
        f"{RANKS} x {mebibytes} MiB in {TENSORS} tensors",
        f"raw write+fsync {write:.2f} s; raw read {read:.2f} s cached, {cold:.2f} s cold",
        f"save {seconds['save'] / write:.2f}x",
        f"save stall {seconds['save stall'] / seconds['save']:.1%} of a save",
        f"cold load with hashes {seconds['cold load'] / cold:.2f}x",
        f"cached load with hashes {seconds['load'] / read:.2f}x",
        f"cached load without {seconds['load unverified'] / read:.2f}x",
        f"median of {REPEATS}",
    ]
    print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
