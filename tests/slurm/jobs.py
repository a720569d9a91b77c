"""Runs on a real Slurm: how they are submitted, watched, and compared with the run that nobody disturbed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from data_pipeline.config import DataConfig
from parallel.manifest import write_durably
from tests.faults.life import WORLD_SIZE, Life
from tests.slurm.cluster import ENDED, Cluster, wait_until
from tests.spawn import ROOT
from tests.training.lives import steps_by_life
from tests.training.tiny_run import SMALLEST, write_run_file

SAVE_EVERY = 5
# No shell may read any of this as a command, and no Slurm as a pattern of its own.
UGLY = 'a "run" it\'s $(touch pwned) `touch pwned` 50%j &#1'
# without TORCHDYNAMO_DISABLE, which ranks without a GPU set when they have started, each of them imports a compiler
SITE = """\
time: "30:00"
gpus_per_node: 0
ranks_per_node: 2
signal_before_end_s: 50
preflight:
  {scratch_dir: LOCAL, min_scratch_gib: 0.01, min_run_dir_gib: 0.1, min_write_mib_per_s: 0.1,
    max_clock_offset_s: 30.0, wait_s: 60.0}
environment: {OMP_NUM_THREADS: "1", TORCHDYNAMO_DISABLE: "1"}
"""


def endless_run(
    run_dir: Path, data: DataConfig, *, steps: int = 10**6, local: Path | None = None, margin_s: float = 20.0
) -> Path:
    """A run file that a test ends by setting its steps.

    local: a disk of each node, for a copy of every state that is not in a checkpoint: then half of them are in none.
    """
    checkpoint: dict[str, Any] = {"every_steps": SAVE_EVERY}
    if local is not None:
        copies = {"directory": str(local / "copies"), "every_steps": SAVE_EVERY}
        checkpoint = {"every_steps": 2 * SAVE_EVERY, "local": copies}
    return write_run_file(
        run_dir,
        data,
        steps=steps,
        checkpoint=checkpoint,
        **SMALLEST | {"training": SMALLEST["training"] | {"end_margin_s": margin_s}},
    )


def launch(cluster: Cluster, run_file: Path, site: str = SITE, *options: str) -> list[str]:
    """`m1 launch slurm`; the numbers of the jobs."""
    site_file = run_file.with_name("site.yaml")
    site_file.write_text(site.replace("LOCAL", str(cluster.local)))
    command = [
        sys.executable,
        "-m",
        "megatron_m1",
        "launch",
        "slurm",
        str(run_file),
        "--site",
        str(site_file),
        *options,
    ]
    done = subprocess.run(
        command, cwd=run_file.parent, env=cluster.environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return re.findall(r"^submitted ([\d ]+);", done.stderr, flags=re.MULTILINE)[0].split()


def by_hand(name: str, **settings: str) -> str:
    """A script of slurm/ with settings of its head replaced, as a user edits it."""
    text = (ROOT / "slurm" / name).read_text()
    for setting, value in settings.items():
        text, count = re.subn(rf"^{setting}=.*$", lambda _: f"{setting}={value}", text, flags=re.MULTILINE)  # noqa: B023
        assert count == 1, f"{setting} is set {count} times in {name}"
    return text


def undisturbed(data: DataConfig, run_dir: Path, steps: int) -> Path:
    """The same run on this machine alone, without Slurm."""
    life = Life(endless_run(run_dir, data, steps=steps), run_dir.with_name("logs"))
    assert life.wait(timeout_s=400) == [0] * WORLD_SIZE, life.said()
    return run_dir


def repeated(run_dir: Path, life: int) -> int:
    """Steps that a life took although the life before had."""
    lives = steps_by_life(run_dir)
    return lives[life - 1][1][-1] - lives[life][0]


def periodic_saves(run_dir: Path) -> set[int]:
    """Steps after which a save was due, and the steps that lives began with."""
    begun = {step for step, _ in steps_by_life(run_dir)[:-1]}
    return begun | set(range(0, 10**4, SAVE_EVERY))


def wait_for_steps(cluster: Cluster, number: str, run_dir: Path, *, life: int, count: int) -> None:
    """Until the given life of the run has taken some steps; none may repeat more than the last save's."""

    def there() -> bool:
        lives = steps_by_life(run_dir)
        taken = len(lives) > life and len(lives[life][1]) >= count
        assert taken or cluster.job(number)["JobState"] not in ENDED, describe()
        return taken

    def describe() -> str:
        return f"{steps_by_life(run_dir)}\n{cluster.job(number)}\n{logs(run_dir, '*')}"

    wait_until(there, 240, describe)
    assert len(steps_by_life(run_dir)) == life + 1
    # the newest save may still have been in flight when the life ended
    assert life == 0 or 0 <= repeated(run_dir, life) <= 2 * SAVE_EVERY, describe()


def stop_soon_after_the_next_start(cluster: Cluster, number: str, run_dir: Path) -> int:
    """Wait for a stop in good order, and give the life after it few steps to take; the run's last step."""
    outcome = run_dir / "outcome.txt"
    wait_until(
        lambda: outcome.exists() and outcome.read_text().startswith("stopped"),
        180,
        lambda: f"{cluster.job(number)}\n{logs(run_dir, '*')}",
    )
    stopped_after = int(re.findall(r"after step (\d+)", outcome.read_text())[0])
    return end_after(run_dir, stopped_after + 3)


def end_after(run_dir: Path, step: int) -> int:
    """Make a step the last one of the lives to come."""
    run_file = run_dir / "run.yaml"
    text, count = re.subn(r"^  steps: \d+$", f"  steps: {step}", run_file.read_text(), flags=re.MULTILINE)
    assert count == 1
    # ranks may be reading it
    write_durably(run_file, text.encode())
    return step


def ranks_on(cluster: Cluster, node: str) -> list[int]:
    """The ranks on a node, without the processes they have forked."""
    found: dict[int, int] = {}
    for pid in cluster.processes_on(node):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except FileNotFoundError:
            continue
        if b"train" in words and words[0].endswith(b"python"):
            found[pid] = parent
    return [pid for pid, parent in found.items() if parent not in found]


def logs(run_dir: Path, pattern: str) -> str:
    """What was logged into files whose names match."""
    files = sorted((run_dir / "logs").glob(pattern))
    return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-20000:]}" for file in files)
