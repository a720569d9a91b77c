"""Runs a function on N gloo ranks of this machine and gives back what each rank returned."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parallel.launch import host_local_ranks

ROOT = Path(__file__).resolve().parent.parent
_RANK_MAIN = "from tests.spawn import rank_main; rank_main()"


def run_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 300.0
) -> list[Any]:
    """Call `function(*arguments)` in `world_size` fresh processes joined by gloo; results by rank.

    `function` must be importable by name (a module-level function of a test module). A rank that fails ends the
    others, and its traceback is in the error.
    """
    with tempfile.TemporaryDirectory(prefix="m1ranks") as directory:
        task = Path(directory) / "task.pickle"
        task.write_bytes(pickle.dumps((function.__module__, function.__qualname__, arguments)))
        store, meeting_place = host_local_ranks(world_size)
        shared = {
            **os.environ,
            **meeting_place,
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        logs = [Path(directory) / f"rank{rank}.log" for rank in range(world_size)]
        ranks = []
        for rank, log in enumerate(logs):
            environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-c", _RANK_MAIN, directory]
            with log.open("wb") as sink:
                ranks.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=sink, stderr=sink))
        _wait(ranks, logs, timeout_s)
        del store
        return [
            pickle.loads((Path(directory) / f"result{rank}.pickle").read_bytes())
            for rank in range(world_size)
        ]


def _wait(ranks: list[subprocess.Popen], logs: list[Path], timeout_s: float) -> None:
    import time

    deadline = time.monotonic() + timeout_s
    try:
        while any(process.poll() is None for process in ranks):
            broken = [rank for rank, process in enumerate(ranks) if process.poll() not in (None, 0)]
            if broken:
                # the first rank to fail knows why; give the others a moment to write their own traceback
                time.sleep(0.5)
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"ranks still running after {timeout_s} s\n{_tails(logs)}")
            time.sleep(0.02)
        codes = [process.poll() for process in ranks]
        if any(codes):
            raise RuntimeError(f"exit codes by rank: {codes}\n{_tails(logs)}")
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def _tails(logs: list[Path], lines: int = 40) -> str:
    return "\n".join(
        f"--- rank {rank}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
        for rank, log in enumerate(logs)
    )


def rank_main() -> None:
    """Entry of one rank: join the group, run the task, leave the result in a file."""
    import importlib

    import torch

    from parallel import cpu
    from parallel.launch import connect, read_environment

    torch.set_num_threads(1)
    cpu.install()
    launch = read_environment()
    connect(launch, timeout_s=120.0)
    directory = Path(sys.argv[1])
    module, name, arguments = pickle.loads((directory / "task.pickle").read_bytes())
    result = getattr(importlib.import_module(module), name)(*arguments)
    (directory / f"result{launch.rank}.pickle").write_bytes(pickle.dumps(result))
    torch.distributed.destroy_process_group()
