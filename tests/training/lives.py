"""Lives of a run, how they end, and what two runs that should be equal are compared by."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_m1.config import load_run
from megatron_m1.stages import stages_of
from megatron_m1.training.spool import read_steps
from parallel.manifest import list_checkpoints, read_manifest
from tests.spawn import ROOT, become, fork_ranks


class Ranks:
    """The ranks of `m1 train`, forked from a process that has imported everything: imports are most of a tiny run.

    Read it as a process: it runs while one of them does, and the first of them to fail gives the exit code.
    """

    def __init__(self, run_file: Path) -> None:
        self._logs = run_file.with_suffix(".logs")
        self._logs.mkdir(exist_ok=True)
        world_size = max(stage.config.layout.world_size for stage in stages_of(load_run(run_file)))
        # the store is there for as long as this object
        self._store, self._ranks = fork_ranks(world_size, _rank_main, run_file, self._logs)

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        codes = [rank.exitcode for rank in self._ranks]
        return next((code for code in codes if code), None if None in codes else 0)

    def wait(self, timeout_s: float) -> int:
        """The exit code; the first rank to fail ends the others, and what all have said is printed."""
        deadline = time.monotonic() + timeout_s
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        code = self.poll()
        if code != 0:
            # they find out by themselves, and say why they end
            time.sleep(1.0)
            self.kill()
            for log in sorted(self._logs.glob("rank*.log")):
                print(f"--- {log}\n{log.read_text(errors='replace')[-4000:]}", file=sys.stderr)
        for rank in self._ranks:
            rank.join()
        if code is None:
            raise TimeoutError(f"still running after {timeout_s} s")
        return code

    def kill(self) -> None:
        """SIGKILL to all ranks and what they have started, at once."""
        for rank in self._ranks:
            assert rank.pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            # it may have no process group yet
            rank.kill()
        for rank in self._ranks:
            rank.join()


def _rank_main(environment: dict[str, str], run_file: Path, logs: Path) -> None:
    os.setsid()
    become(environment, logs / f"rank{environment['RANK']}.log")
    import tests.rank_template  # noqa: F401
    from megatron_m1 import cli

    sys.argv = ["m1", "train", str(run_file)]
    cli.main()


def start(run_file: Path) -> Ranks:
    """A life; `start_command` takes the seconds that a user's start takes."""
    return Ranks(run_file)


def start_command(run_file: Path) -> subprocess.Popen:
    """`m1 train` as a user starts it, in a process group of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "megatron_m1", "train", str(run_file)]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True)


def kill(life: Ranks | subprocess.Popen, *, after_s: float = 0.0) -> None:
    """SIGKILL to every process of the run at once, as a power cut does; it may have ended before."""
    time.sleep(after_s)
    if isinstance(life, Ranks):
        life.kill()
        return
    if life.poll() is None:
        os.killpg(life.pid, signal.SIGKILL)
    life.wait()


def wait_for_step(run_dir: Path, process: Ranks | subprocess.Popen, step: int) -> None:
    """Until a step is on record."""
    deadline = time.monotonic() + 240
    while step not in (read_steps(run_dir / "metrics.jsonl") if (run_dir / "metrics.jsonl").exists() else {}):
        assert process.poll() is None, f"the run ended before step {step}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_checkpoint(run_dir: Path, process: Ranks | subprocess.Popen, step: int) -> None:
    """Until a checkpoint of this step or a later one is complete: the next life goes on from there."""
    deadline = time.monotonic() + 240
    while not any(
        entry.complete and entry.step >= step for entry in list_checkpoints(run_dir / "checkpoints")
    ):
        assert process.poll() is None, f"the run ended before a checkpoint of step {step}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_same_run(run_dir: Path, other: Path, *, steps: int) -> None:
    """Every step's numbers, and every tensor of the last checkpoint, bit for bit."""
    ours, theirs = read_steps(run_dir / "metrics.jsonl"), read_steps(other / "metrics.jsonl")
    assert list(ours) == list(theirs) == list(range(1, steps + 1))
    for step in theirs:
        for name in ("loss_nats", "grad_norm", "learning_rate", "auxiliary_loss", "sample_ids_hash"):
            # a step without an update has no norm
            assert ours[step].get(name) == theirs[step].get(name), f"{name} of step {step}"
    assert _tensor_files(run_dir, steps) == _tensor_files(other, steps)


def steps_by_life(run_dir: Path) -> list[tuple[int, list[int]]]:
    """For each life of the run: the step it began after, and the steps it took."""
    found: list[tuple[int, list[int]]] = []
    record = run_dir / "metrics.jsonl"
    for line in record.read_text().splitlines() if record.exists() else []:
        try:
            values = json.loads(line)
        except ValueError:
            continue  # half written
        if values["kind"] == "life":
            found.append((values["step"], []))
        elif values["kind"] == "step":
            found[-1][1].append(values["step"])
    return found


def _tensor_files(run_dir: Path, step: int) -> dict[str, str]:
    """File name -> sha256 of everything that holds tensors in the last checkpoint."""
    manifest = read_manifest(run_dir / "checkpoints" / f"step_{step:08d}")
    return {record.name: record.sha256 for record in manifest.files if record.name.endswith(".distcp")}
