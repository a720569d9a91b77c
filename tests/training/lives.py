"""Lives of a run as a user starts them, how they end, and what two runs that should be equal are compared by."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_m1.training.spool import read_steps
from parallel.manifest import list_checkpoints, read_manifest
from tests.spawn import ROOT


def start(run_file: Path) -> subprocess.Popen:
    """`m1 train` in a process group of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "megatron_m1", "train", str(run_file)]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True)


def kill(process: subprocess.Popen, *, after_s: float = 0.0) -> None:
    """SIGKILL to every process of the run at once, as a power cut does; it may have ended before."""
    time.sleep(after_s)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for_step(run_dir: Path, process: subprocess.Popen, step: int) -> None:
    """Until a step is on record."""
    deadline = time.monotonic() + 240
    while step not in (read_steps(run_dir / "metrics.jsonl") if (run_dir / "metrics.jsonl").exists() else {}):
        assert process.poll() is None, f"the run ended before step {step}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_checkpoint(run_dir: Path, process: subprocess.Popen, step: int) -> None:
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
