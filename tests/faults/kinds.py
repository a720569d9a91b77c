"""The faults of the campaign: what each does to a run, and what must be seen of it."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from megatron_m1.training.health import refused_steps
from parallel.hang import HANG_EXIT_CODE, REPORT_NAME
from parallel.manifest import MANIFEST_NAME, list_checkpoints
from tests.faults.life import WORLD_SIZE, Life, Planted

STEPS = 10
SAVE_EVERY = 2
# Slow enough that a fault meant for the middle of a run does not come after its end on a busy machine.
SECONDS_PER_STEP = 0.3
# Longer than a step on a busy machine.
HANG_TIMEOUT_S = 8.0


@dataclass(slots=True)
class Trial:
    """One run with its fault; lives are started until it is finished."""

    run_file: Path
    run_dir: Path
    shard: Path
    """Prefix of the run's own copy of its training shard."""
    random: random.Random
    lives: int = 0
    detected: bool = False
    """Whether the fault was named: by an error, a warning, a report or a record."""
    refused: set[int] = field(default_factory=set)
    """Steps whose update was not made, and rightly so."""

    def start(self, planted: Planted | None = None) -> Life:
        """The next life."""
        self.lives += 1
        return Life(self.run_file, self.run_dir.parent / f"logs{self.lives}", planted)

    def run_until_a_moment(self) -> Life:
        """A life, at some moment after the first checkpoint and before the last steps."""
        life = self.start(Planted(seconds_per_step=SECONDS_PER_STEP))
        life.wait_for_step(self.run_dir, self.random.randint(SAVE_EVERY + 1, STEPS - 4))
        time.sleep(self.random.uniform(0.0, SECONDS_PER_STEP))
        return life

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return [entry.path for entry in list_checkpoints(self.run_dir / "checkpoints") if entry.complete]


def killed(trial: Trial) -> None:
    """A rank is killed: the others notice."""
    life = trial.run_until_a_moment()
    victim = trial.random.randrange(WORLD_SIZE)
    life.signal(victim, signal.SIGKILL)
    codes = life.wait()
    trial.detected = all(code != 0 for code in codes)


def stopped(trial: Trial) -> None:
    """A rank is stopped, at any moment or where a save begins: the watchdog names it."""
    text = trial.run_file.read_text()
    trial.run_file.write_text(text + f"health: {{hang_timeout_s: {HANG_TIMEOUT_S}}}\n")
    victim = trial.random.randrange(WORLD_SIZE)
    if trial.random.random() < 0.5:
        life = trial.start(Planted(rank=victim, stop_at_save=trial.random.randint(1, STEPS // SAVE_EVERY)))
    else:
        life = trial.run_until_a_moment()
        life.signal(victim, signal.SIGSTOP)
    codes = life.wait(grace_s=30.0)
    report = trial.run_dir / "hang" / REPORT_NAME
    named = report.exists() and report.read_text().startswith(f"HANG: rank {victim} wrote nothing")
    trial.detected = named and HANG_EXIT_CODE in codes
    trial.run_file.write_text(text)


def torn_checkpoint(trial: Trial) -> None:
    """A rank or its writer dies between two file operations of a save: no rank goes on."""
    rank, operation = trial.random.randrange(2), 61
    struck = False
    while not struck:
        # the operation drawn before lay behind the end of the run, which is begun anew
        shutil.rmtree(trial.run_dir, ignore_errors=True)
        operation = trial.random.randint(1, operation - 1)
        life = trial.start(Planted(rank=rank, crash_at_file_operation=operation))
        codes = life.wait()
        struck = life.struck
    trial.lives = 1
    trial.detected = all(codes)


def bit_flip(trial: Trial) -> None:
    """A byte of the newest checkpoint changes: it is refused by name, and goes; the one before it is used."""
    trial.run_until_a_moment().kill()
    newest = trial.checkpoints()[-1]
    shard = trial.random.choice(sorted(newest.glob("*.distcp")))
    content = bytearray(shard.read_bytes())
    place = trial.random.randrange(len(content))
    content[place] ^= 1 << trial.random.randrange(8)
    shard.write_bytes(content)
    life = trial.start()
    codes = life.wait()
    trial.detected = all(codes) and f"{shard.name} has checksum" in life.said()
    newest.rename(newest.with_name("damaged"))


def disk_full(trial: Trial) -> None:
    """The file system of the checkpoints has no room for the next one (needs root, for a file system of its own)."""
    place = trial.run_dir / "checkpoints"
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], check=True)
    try:
        life = trial.run_until_a_moment()
        with _filled(place / "ballast"):
            codes = life.wait()
        trial.detected = all(codes) and "are free" in life.said()
        (place / "ballast").unlink()
        trial.start().wait()
    finally:
        kept = place.with_name("kept")
        subprocess.run(["cp", "-a", str(place), str(kept)], check=True)
        subprocess.run(["umount", "--lazy", str(place)], check=True)
        place.rmdir()
        kept.rename(place)


@contextlib.contextmanager
def _filled(ballast: Path) -> Iterator[None]:
    """Leave no free byte on a file system, also where something else is deleted meanwhile."""
    ended = threading.Event()

    def fill() -> None:
        # unbuffered: closing would write again what did not fit
        with ballast.open("wb", buffering=0) as stream:
            while not ended.is_set():
                try:
                    stream.write(bytes(1 << 16))
                except OSError:
                    ended.wait(0.01)

    filling = threading.Thread(target=fill)
    filling.start()
    try:
        yield
    finally:
        ended.set()
        filling.join()


def slow_disk(trial: Trial) -> None:
    """Every file takes a while: the run waits or goes on, and ends as it should."""
    life = trial.start(Planted(rank=trial.random.randrange(WORLD_SIZE), seconds_per_file=0.05))
    trial.detected = life.wait() == [0] * WORLD_SIZE


def mlflow_down(trial: Trial) -> None:
    """Nobody answers at the tracking server: the run goes on and says what is not sent."""
    text = trial.run_file.read_text()
    assert "enabled: false" in text, text
    trial.run_file.write_text(text.replace("enabled: false", "uri: 'http://127.0.0.1:9'"))
    life = trial.start()
    codes = life.wait()
    trial.detected = codes == [0] * WORLD_SIZE and "MLflow" in life.said()
    trial.run_file.write_text(text)


def truncated_data(trial: Trial) -> None:
    """The shard has lost its end when the run is started again: it is refused by name, and comes back from a copy."""
    trial.run_until_a_moment().kill()
    shard = Path(f"{trial.shard}.bin")
    content = shard.read_bytes()
    shard.write_bytes(content[: trial.random.randrange(len(content) - 1)])
    life = trial.start()
    codes = life.wait()
    trial.detected = all(codes) and shard.name in life.said()
    shard.write_bytes(content)


def clock_jump(trial: Trial) -> None:
    """The wall clock of a rank jumps by hours: nothing may depend on it."""
    jump_s = trial.random.choice((-7200.0, 7200.0))
    life = trial.start(Planted(rank=trial.random.randrange(WORLD_SIZE), clock_jump_s=jump_s))
    trial.detected = life.wait() == [0] * WORLD_SIZE


def nan_gradient(trial: Trial) -> None:
    """A gradient is NaN on one rank in one step: no rank makes the step, and it is on record with its samples."""
    step = trial.random.randint(3, STEPS - 2)
    life = trial.start(Planted(rank=trial.random.randrange(WORLD_SIZE), nan_at_step=step))
    codes = life.wait()
    records = refused_steps(trial.run_dir)
    trial.refused = {record["step"] for record in records}
    trial.detected = codes == [0] * WORLD_SIZE and trial.refused == {step} and records[0]["num_samples"] > 0


def broken_weights(trial: Trial) -> None:
    """A step leaves a NaN in the weights, and it is saved: the run goes back before that step and passes over it."""
    text = trial.run_file.read_text()
    trial.run_file.write_text(text + "health: {max_refused_in_a_row: 2}\n")
    step = trial.random.randint(SAVE_EVERY + 1, STEPS - 4)
    # the last stage, so that no router meets it
    life = trial.start(Planted(rank=WORLD_SIZE - 1, weights_broken_after_step=step))
    codes = life.wait()
    trial.run_file.write_text(text)
    records = refused_steps(trial.run_dir)
    trial.refused = {record["step"] for record in records}
    aside = [int(path.name[5:13]) for path in (trial.run_dir / "checkpoints").glob("*.broken")]
    trial.detected = (
        all(codes)
        and f"step {step} before them has broken the weights" in life.said()
        and trial.refused == {step, step + 1, step + 2, step + 3}
        and all(record["num_samples"] > 0 for record in records)
        and bool(aside)
        and min(aside) >= step
        and all(entry < step for entry in (int(path.name[5:13]) for path in trial.checkpoints()))
    )


def corrupted_manifest(trial: Trial) -> None:
    """The newest manifest is damaged: that checkpoint is passed over with a warning, and the one before it is used."""
    trial.run_until_a_moment().kill()
    manifest = trial.checkpoints()[-1] / MANIFEST_NAME
    content = manifest.read_bytes()
    cut = trial.random.randrange(len(content))
    manifest.write_bytes(content[:cut] + os.urandom(8) + content[cut + 8 :])
    life = trial.start()
    codes = life.wait()
    trial.detected = codes == [0] * WORLD_SIZE and "not resumed from" in life.said()


def lost_node(trial: Trial) -> None:
    """A node and its disk are lost: its ranks go on from the peer's copies; with both lost, from the checkpoint."""
    text, local = trial.run_file.read_text(), trial.run_dir.parent / "local"
    lost = trial.random.choice((["n0"], ["n1"], ["n0", "n1"]))
    values = yaml.safe_load(text)
    values["checkpoint"]["local"] = {"directory": str(local), "every_steps": 1}
    if len(lost) == 1:
        # nothing else is left to go on from
        values["checkpoint"]["every_steps"] = 0
    trial.run_file.write_text(yaml.safe_dump(values))
    trial.run_until_a_moment().kill()
    for node in lost:
        shutil.rmtree(local / node)
    life = trial.start()
    codes = life.wait()
    place = local if len(lost) == 1 else trial.run_dir / "checkpoints"
    resumed = re.search(rf"resumed from step \d+ in {re.escape(str(place))}", life.said())
    from_peer = "have their node-local copies of step" in life.said()
    trial.detected = codes == [0] * WORLD_SIZE and bool(resumed) and from_peer == (len(lost) == 1)
    trial.run_file.write_text(text)


KINDS: dict[str, Callable[[Trial], None]] = {
    kind.__name__: kind
    for kind in (
        killed, stopped, torn_checkpoint, bit_flip, disk_full, slow_disk, mlflow_down, truncated_data, clock_jump,
        nan_gradient, broken_weights, corrupted_manifest, lost_node,
    )
}  # fmt: skip


def can_run(name: str) -> bool:
    """Whether this machine can have the fault."""
    return name != "disk_full" or os.geteuid() == 0
