"""Runs a function on N gloo ranks of this machine and gives back what each rank returned.

Ranks are forked from one process per test session that has imported torch and megatron-core and done nothing else:
importing them takes longer than most tests.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from parallel.launch import host_local_ranks

ROOT = Path(__file__).resolve().parent.parent


def run_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 300.0
) -> list[Any]:
    """Call `function(*arguments)` in `world_size` new processes joined by gloo; results by rank.

    `function` must be importable by name (a module-level function of a test module). A rank that fails ends the
    others, and its traceback is in the error.
    """
    with tempfile.TemporaryDirectory(prefix="m1ranks") as name:
        directory = Path(name)
        (directory / "task.pickle").write_bytes(
            pickle.dumps((function.__module__, function.__qualname__, arguments))
        )
        store, ranks = fork_ranks(world_size, rank_main, directory)
        logs = [_log(directory, rank) for rank in range(world_size)]
        _wait(ranks, logs, timeout_s)
        del store
        return [pickle.loads(_result(directory, rank).read_bytes()) for rank in range(world_size)]


def fork_ranks(
    world_size: int,
    target: Callable[..., None],
    *arguments: Any,
    place_of: Callable[[int], dict[str, str]] = lambda rank: {"RANK": str(rank), "LOCAL_RANK": str(rank)},
) -> tuple[TCPStore, list[ForkServerProcess]]:
    """Start `target(environment, *arguments)` in `world_size` processes; keep the store until they have ended.

    place_of: what a launcher tells a rank besides the meeting place.
    """
    store, meeting_place = host_local_ranks(world_size)
    # the forking process took its environment when it started; a test may have changed its own since
    shared = {**os.environ, **meeting_place, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    ranks = [
        _forking().Process(target=target, args=(shared | place_of(rank), *arguments))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    return store, ranks


@functools.cache
def _forking() -> ForkServerContext:
    # one thread per rank, or they fight for the cores; it must be known before torch is imported
    os.environ["OMP_NUM_THREADS"] = "1"
    # asking whether there is a GPU must not start CUDA: a forked rank could not start it again
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.rank_template"])
    return context


def _log(directory: Path, rank: int) -> Path:
    return directory / f"rank{rank}.log"


def _result(directory: Path, rank: int) -> Path:
    return directory / f"result{rank}.pickle"


def _wait(ranks: list[ForkServerProcess], logs: list[Path], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    try:
        while any(process.exitcode is None for process in ranks):
            if any(process.exitcode not in (None, 0) for process in ranks):
                # the first rank to fail knows why; give the others a moment to write their own traceback
                time.sleep(0.5)
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"ranks still running after {timeout_s} s\n{_tails(logs)}")
            time.sleep(0.02)
        codes = [process.exitcode for process in ranks]
        if any(codes):
            raise RuntimeError(f"exit codes by rank: {codes}\n{_tails(logs)}")
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _tails(logs: list[Path], lines: int = 40) -> str:
    return "\n".join(
        f"--- rank {rank}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
        for rank, log in enumerate(logs)
        if log.exists()
    )


def rank_main(environment: dict[str, str], directory: Path) -> None:
    """Entry of one rank: join the group, run the task, leave the result in a file."""
    import importlib

    import torch

    import tests.rank_template  # noqa: F401  (forkserver passes over an import that fails: here it is told)
    from parallel.launch import connect, read_environment

    become(environment, _log(directory, int(environment["RANK"])))
    launch = read_environment()
    connect(launch, timeout_s=120.0)
    module, name, arguments = pickle.loads((directory / "task.pickle").read_bytes())
    result = getattr(importlib.import_module(module), name)(*arguments)
    _result(directory, launch.rank).write_bytes(pickle.dumps(result))
    torch.distributed.destroy_process_group()


def become(environment: dict[str, str], log: Path) -> None:
    """In a forked process: the environment, the place and the output of a process that was started."""
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(ROOT)
