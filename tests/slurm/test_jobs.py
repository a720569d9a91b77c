"""Jobs on a real Slurm: whatever ends a life, the next one repeats at most the steps since the last save, and the
losses are those of the run that nobody disturbed, bit for bit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig
from tests.slurm.cluster import ENDED, Cluster, missing, wait_until
from tests.spawn import ROOT
from tests.training.lives import assert_same_run, steps_by_life
from tests.training.tiny_run import data_in, write_run_file, write_shards

pytestmark = pytest.mark.multiprocess

SAVE_EVERY = 5
# No shell may read any of this as a command, and no Slurm as a pattern of its own.
UGLY = 'a "run" it\'s $(touch pwned) `touch pwned` 50%j &#1'
_SITE = """\
time: "30:00"
gpus_per_node: 0
ranks_per_node: 2
signal_before_end_s: 50
preflight:
  {scratch_dir: LOCAL, min_scratch_gib: 0.01, min_run_dir_gib: 0.1, min_write_mib_per_s: 0.1,
    max_clock_offset_s: 30.0, wait_s: 60.0}
environment: {OMP_NUM_THREADS: "1"}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Four nodes. Their absence is loud, and in CI a failure."""
    reason = missing()
    if reason and "CI" in os.environ:
        pytest.fail(f"the tests on a real Slurm cannot run: {reason}")
    if reason:
        pytest.skip(f"NO TEST ON A REAL SLURM: {reason}")
    with Cluster(4) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Two small shards."""
    directory = tmp_path_factory.mktemp("data")
    write_shards(directory)
    return data_in(directory)


@pytest.mark.slow
def test_a_job_outlives_full_disk_preemption_crash_power_cut_drain_and_wall_time(
    cluster: Cluster, data: DataConfig, tmp_path: Path
) -> None:
    run_dir = tmp_path / UGLY / "run"
    cluster.fill_local_disk("n0")
    number = _launch(cluster, _endless_run(run_dir, data))
    # the first start finds the full disk and excludes its node
    _wait_for_steps(cluster, number, run_dir, life=0, count=2)
    assert cluster.job(number)["Restarts"] == "1"
    assert "bad node n0: 0.00 GiB free for temporary files" in _logs(run_dir, f"{number}-0.*preflight*")
    assert cluster.job(number)["ExcNodeList"] == "n0"
    # preemption says TERM: the ranks agree, save and leave, so nothing is repeated; a drained node is not used again
    drained = cluster.nodes_of(number)[0]
    cluster.run("scontrol", "update", f"nodename={drained}", "state=drain", "reason=test")
    cluster.run("scontrol", "requeue", number)
    _wait_for_steps(cluster, number, run_dir, life=1, count=SAVE_EVERY + 2)
    assert _repeated(run_dir, life=1) == 0
    assert {drained, "n0"}.isdisjoint(cluster.nodes_of(number))
    cluster.run("scontrol", "update", f"nodename={drained}", "state=resume")
    # one rank dies, the others get TERM from srun: what they might save would not be a step of the whole run
    os.kill(_ranks_on(cluster, cluster.nodes_of(number)[1])[0], signal.SIGKILL)
    _wait_for_steps(cluster, number, run_dir, life=2, count=SAVE_EVERY + 2)
    assert steps_by_life(run_dir)[2][0] in _periodic_saves(run_dir)
    # nobody is told of a power cut: Slurm finds out and queues the job again
    lost = cluster.nodes_of(number)[0]
    cluster.kill_node(lost)
    _wait_for_steps(cluster, number, run_dir, life=3, count=2)
    assert lost not in cluster.nodes_of(number)
    cluster.start_node(lost)
    # the wall-time is about to end: USR1 comes first
    minutes, seconds = (int(part) for part in cluster.job(number)["RunTime"].split(":")[1:])
    cluster.run(
        "scontrol", "update", f"jobid={number}", f"TimeLimit={(60 * minutes + seconds + 55) // 60 + 1}"
    )
    final = _stop_soon_after_the_next_start(cluster, number, run_dir)
    cluster.run("scontrol", "update", f"jobid={number}", "TimeLimit=30")
    assert cluster.wait_for_end(number)["JobState"] == "COMPLETED"
    assert _repeated(run_dir, life=4) == 0
    assert (run_dir / "outcome.txt").read_text() == f"finished at step {final}\n"
    assert "queued again: stopped after step" in _logs(run_dir, f"{number}.out")
    assert not list(tmp_path.rglob("pwned"))
    assert_same_run(run_dir, _undisturbed(data, tmp_path / "whole", final), steps=final)


def test_a_chain_of_three_jobs_goes_on_after_scancel_and_before_the_wall_time(
    cluster: Cluster, data: DataConfig, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_file = _endless_run(run_dir, data)
    run_dir.mkdir()
    # of two minutes about forty seconds are left to train
    (run_dir / "run.yaml").write_text(
        run_file.read_text().replace("end_margin_s: 20.0", "end_margin_s: 80.0")
    )
    script = _by_hand(
        "pretrain.sbatch",
        RUN_DIR=str(run_dir), WORK_DIR=str(tmp_path), COMMAND=f"(train {run_dir}/run.yaml)", PYTHON=sys.executable,
        LAUNCHER="torchrun", CONTINUE="chain", PREFLIGHT="()",
    )  # fmt: skip
    # as the head says: torchrun dies of it
    script = script.replace("#SBATCH --signal=USR1@300\n", "")
    (tmp_path / "by-hand.sbatch").write_text(script)
    options = [
        "--array=1-3%1",
        "--nodes=2",
        "--ntasks-per-node=2",
        "--gpus-per-node=0",
        "--time=30",
        "--exclude=n0",
    ]
    command = ["sbatch", "--parsable", f"--chdir={tmp_path}", "--export=ALL,OMP_NUM_THREADS=1", *options]
    number = cluster.run(*command, tmp_path / "by-hand.sbatch")
    _wait_for_steps(cluster, f"{number}_1", run_dir, life=0, count=SAVE_EVERY + 2)
    cluster.run("scontrol", "update", f"jobid={number}_2", "TimeLimit=2")
    cluster.run("scancel", f"{number}_1")
    _wait_for_steps(cluster, f"{number}_2", run_dir, life=1, count=1)
    assert cluster.job(f"{number}_1")["JobState"] == "CANCELLED"
    # torchrun would die of USR1: the ranks look at the clock
    final = _stop_soon_after_the_next_start(cluster, f"{number}_2", run_dir)
    assert cluster.wait_for_end(f"{number}_3")["JobState"] == "COMPLETED"
    assert cluster.job(f"{number}_2")["JobState"] == "COMPLETED"
    assert _repeated(run_dir, life=2) == 0
    assert_same_run(run_dir, _undisturbed(data, tmp_path / "whole", final), steps=final)


def test_three_starts_without_progress_end_the_job_with_the_reason(
    cluster: Cluster, data: DataConfig, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    site = "preflight: {enabled: false}\npython: /bin/false\nranks_per_node: 4\ngpus_per_node: 0\n"
    number = _launch(cluster, _endless_run(run_dir, data), site)
    assert cluster.wait_for_end(number)["JobState"] == "FAILED"
    assert cluster.job(number)["Restarts"] == "2"
    assert (
        (run_dir / "outcome.txt")
        .read_text()
        .startswith("gave up: 3 starts in a row brought no new checkpoint")
    )
    # the next job of a chain sees it and costs nothing
    again = cluster.run("sbatch", "--parsable", run_dir / "slurm" / "job.sbatch")
    assert cluster.wait_for_end(again)["JobState"] == "FAILED"
    assert "nothing to do: gave up" in _logs(run_dir, f"{again}.out")


def _endless_run(run_dir: Path, data: DataConfig) -> Path:
    """A run file that a test ends by setting its steps."""
    return write_run_file(
        run_dir,
        data,
        steps=10**6,
        layout={"tp": 2, "pp": 2, "ep": 1},
        checkpoint={"every_steps": SAVE_EVERY},
        training={"end_margin_s": 20.0},
    )


def _launch(cluster: Cluster, run_file: Path, site: str = _SITE) -> str:
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
    ]
    done = subprocess.run(
        command, cwd=run_file.parent, env=cluster.environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return re.findall(r"^submitted (\d+)", done.stderr, flags=re.MULTILINE)[0]


def _by_hand(name: str, **settings: str) -> str:
    """A script of slurm/ with settings of its head replaced, as a user edits it."""
    text = (ROOT / "slurm" / name).read_text()
    for setting, value in settings.items():
        text, count = re.subn(rf"^{setting}=.*$", lambda _: f"{setting}={value}", text, flags=re.MULTILINE)  # noqa: B023
        assert count == 1, f"{setting} is set {count} times in {name}"
    return text


def _undisturbed(data: DataConfig, run_dir: Path, steps: int) -> Path:
    """The same run on this machine alone, without Slurm."""
    run_file = _endless_run(run_dir, data)
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "megatron_m1",
        "train",
        str(run_file),
        f"training.steps={steps}",
    ]
    subprocess.run(command, check=True, cwd=ROOT, timeout=300)
    return run_dir


def _repeated(run_dir: Path, life: int) -> int:
    """Steps that a life took although the life before had."""
    lives = steps_by_life(run_dir)
    return lives[life - 1][1][-1] - lives[life][0]


def _periodic_saves(run_dir: Path) -> set[int]:
    """Steps after which a save was due, and the steps that lives began with."""
    begun = {step for step, _ in steps_by_life(run_dir)[:-1]}
    return begun | set(range(0, 10**4, SAVE_EVERY))


def _wait_for_steps(cluster: Cluster, number: str, run_dir: Path, *, life: int, count: int) -> None:
    """Until the given life of the run has taken some steps; none may repeat more than the last save's."""

    def there() -> bool:
        lives = steps_by_life(run_dir)
        taken = len(lives) > life and len(lives[life][1]) >= count
        assert taken or cluster.job(number)["JobState"] not in ENDED, describe()
        return taken

    def describe() -> str:
        return f"{steps_by_life(run_dir)}\n{cluster.job(number)}\n{_logs(run_dir, '*')}"

    wait_until(there, 240, describe)
    assert len(steps_by_life(run_dir)) == life + 1
    # the newest save may still have been in flight when the life ended
    assert life == 0 or 0 <= _repeated(run_dir, life) <= 2 * SAVE_EVERY, describe()


def _stop_soon_after_the_next_start(cluster: Cluster, number: str, run_dir: Path) -> int:
    """Wait for a stop in good order, and give the life after it few steps to take; the run's last step."""
    outcome = run_dir / "outcome.txt"
    wait_until(
        lambda: outcome.exists() and outcome.read_text().startswith("stopped"),
        180,
        lambda: f"{cluster.job(number)}\n{_logs(run_dir, '*')}",
    )
    final = int(re.findall(r"after step (\d+)", outcome.read_text())[0]) + 3
    run_file = run_dir / "run.yaml"
    text, count = re.subn(r"^  steps: \d+$", f"  steps: {final}", run_file.read_text(), flags=re.MULTILINE)
    assert count == 1
    run_file.write_text(text)
    return final


def _ranks_on(cluster: Cluster, node: str) -> list[int]:
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


def _logs(run_dir: Path, pattern: str) -> str:
    """What was logged into files whose names match."""
    files = sorted((run_dir / "logs").glob(pattern))
    return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in files)
