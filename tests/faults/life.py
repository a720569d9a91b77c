"""One life of a run on four ranks, forked from a process that has imported everything, with a fault planted inside.

What is planted runs in the real ranks and in the writers they fork; nothing of the trainer is replaced.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_m1.training.spool import read_lines
from tests.spawn import become, fork_ranks

WORLD_SIZE = 4
RANKS_PER_NODE = 2
_STRUCK_FILE = "struck"


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """What happens inside one rank."""

    rank: int = 0
    crash_at_file_operation: int = 0
    """Die, as by a power cut, at this operation on a file of the checkpoints; 0 never."""
    stop_at_save: int = 0
    """Stop the rank, as SIGSTOP does, where this save of the life begins; 0 never."""
    seconds_per_file: float = 0.0
    """A disk that takes this long for every file it opens below the checkpoints."""
    clock_jump_s: float = 0.0
    """The wall clock jumps by this much after the third step."""
    nan_at_step: int = 0
    """One element of this rank's gradient is NaN in this step; 0 never."""
    weights_broken_after_step: int = 0
    """This rank's last weight is NaN after this step of the life; 0 never."""
    seconds_per_step: float = 0.0
    """Added to every step, on every rank."""
    survey_every_steps: int = 0
    """Steps between two surveys of all ranks, on every rank; 0 leaves it as it is."""
    times_as_slow: int = 1
    """This rank's device takes so many times as long for the work by which ranks are compared."""
    free_memory_gib: float = 0.0
    """All that this rank finds free; 0 leaves it as it is."""


class Life:
    """Four ranks of `m1 train`."""

    def __init__(self, run_file: Path, logs: Path, planted: Planted | None = None) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = logs
        self._store, self.ranks = fork_ranks(
            WORLD_SIZE, _rank_main, run_file, logs, planted, place_of=_place_of
        )

    def signal(self, rank: int, number: int) -> None:
        """A signal to one rank."""
        pid = self.ranks[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def kill(self) -> None:
        """A power cut."""
        for process in self.ranks:
            process.kill()
        self.wait()

    def wait(self, timeout_s: float = 180.0, grace_s: float = 20.0) -> list[int | None]:
        """Exit codes by rank. After the first failure the others get some time to find out, then they are killed."""
        deadline = time.monotonic() + timeout_s
        while any(process.exitcode is None for process in self.ranks) and time.monotonic() < deadline:
            if any(process.exitcode for process in self.ranks):
                deadline = min(deadline, time.monotonic() + grace_s)
                grace_s = timeout_s
            time.sleep(0.02)
        codes = [process.exitcode for process in self.ranks]
        for process in self.ranks:
            process.kill()
            process.join()
        return codes

    def wait_for_step(self, run_dir: Path, step: int) -> bool:
        """Until a life has recorded a step; False when this life ended before."""
        while newest_step(run_dir) < step:
            if all(process.exitcode is not None for process in self.ranks):
                return False
            time.sleep(0.01)
        return True

    @property
    def struck(self) -> bool:
        """Whether the planted crash has come."""
        return (self._logs / _STRUCK_FILE).exists()

    def said(self) -> str:
        """What all ranks have printed."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self._logs.glob("*.log")))


def _place_of(rank: int) -> dict[str, str]:
    """What a launcher tells a rank: here two ranks are one node."""
    node, local = divmod(rank, RANKS_PER_NODE)
    return {"RANK": str(rank), "LOCAL_RANK": str(local), "SLURMD_NODENAME": f"n{node}"}


def newest_step(run_dir: Path) -> int:
    """The last step on record."""
    record = run_dir / "metrics.jsonl"
    lines = [line.values for line in read_lines(record)] if record.exists() else []
    return max((values["step"] for values in lines if values and values["kind"] == "step"), default=0)


def _rank_main(environment: dict[str, str], run_file: Path, logs: Path, planted: Planted | None) -> None:
    rank = int(environment["RANK"])
    become(environment, logs / f"rank{rank}.log")
    import tests.rank_template  # noqa: F401
    from megatron_m1 import vitals
    from megatron_m1.config import load_run
    from megatron_m1.start import train

    config = load_run(run_file)
    if planted is not None:
        _before_steps(lambda *_: time.sleep(planted.seconds_per_step))
        if planted.survey_every_steps:
            vitals._SURVEY_EVERY_STEPS = planted.survey_every_steps
        if planted.rank == rank:
            _plant(planted, config.run_dir, logs)
    train(config)


def _plant(planted: Planted, run_dir: Path, logs: Path) -> None:
    """Wire a fault into this process and those it forks."""
    checkpoints = str(run_dir / "checkpoints")
    operations, own, saves = 0, os.getpid(), set()

    def on_file(event: str, arguments: tuple) -> None:
        nonlocal operations
        if event.split(".")[0] not in ("open", "os", "shutil") or not arguments:
            return
        if not str(arguments[0]).startswith(checkpoints):
            return
        operations += 1
        time.sleep(planted.seconds_per_file)
        if operations == planted.crash_at_file_operation:
            (logs / _STRUCK_FILE).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "os.mkdir" and ".partial-" in str(arguments[0]) and os.getpid() == own:
            saves.add(str(arguments[0]))
            if len(saves) == planted.stop_at_save:
                os.kill(own, signal.SIGSTOP)

    if planted.crash_at_file_operation or planted.seconds_per_file or planted.stop_at_save:
        sys.addaudithook(on_file)
    if planted.clock_jump_s:
        real = time.time
        time.time = lambda: real() + (planted.clock_jump_s if newest_step(run_dir) >= 3 else 0.0)
    if planted.weights_broken_after_step:
        _before_steps(functools.partial(_break_weights, planted.weights_broken_after_step + 1))
    if planted.times_as_slow > 1 or planted.free_memory_gib:
        _plant_poor_device(planted)
    if planted.nan_at_step:
        _plant_nan(planted.nan_at_step)


def _plant_poor_device(planted: Planted) -> None:
    from megatron_m1 import vitals

    vitals._PROBE_REPEATS *= planted.times_as_slow
    if planted.free_memory_gib:
        vitals._free_gib = lambda _device: planted.free_memory_gib


def _break_weights(before_step: int, step: int, trainer: Any) -> None:
    if step == before_step:
        list(trainer.chunks[-1].parameters())[-1].data.fill_(float("nan"))


def _before_steps(action: Callable[[int, Any], None]) -> None:
    """Call `action` with the number of the step in this life, and the trainer, before each step of training."""
    from megatron_m1.training.loop import Trainer

    real, taken = Trainer._train_step, 0

    def with_action(trainer: Trainer, rows: Any) -> None:
        nonlocal taken
        taken += 1
        action(taken, trainer)
        real(trainer, rows)

    Trainer._train_step = with_action  # type: ignore[method-assign]


def _plant_nan(at_step: int) -> None:
    from megatron_m1.training import loop

    real, due = loop.run_microbatches, False

    def note(step: int, _trainer: Any) -> None:
        nonlocal due
        due = step == at_step

    def with_nan(chunks, microbatches, groups, **options):
        nonlocal due
        result = real(chunks, microbatches, groups, **options)
        if due:
            chunks[0].buffers[0].grad_data[0] = float("nan")
            due = False
        return result

    _before_steps(note)
    loop.run_microbatches = with_nan
