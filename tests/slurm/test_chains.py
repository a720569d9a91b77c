"""Chains of jobs on a real Slurm, and jobs that give up: a file of its own, so that another worker can take it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import (
    SAVE_EVERY,
    UGLY,
    by_hand,
    endless_run,
    launch,
    logs,
    repeated,
    stop_soon_after_the_next_start,
    undisturbed,
    wait_for_steps,
)
from tests.training.lives import assert_same_run

pytestmark = pytest.mark.multiprocess
# Every start ends at once, without a checkpoint.
_HOPELESS = "preflight: {enabled: false}\npython: /bin/false\nranks_per_node: 4\ngpus_per_node: 0\n"


def test_a_chain_of_three_jobs_goes_on_after_scancel_and_before_the_wall_time(
    cluster: Cluster, data: DataConfig, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    # of two minutes about twenty seconds are left to train
    endless_run(run_dir, data, margin_s=100.0).rename(run_dir / "run.yaml")
    script = by_hand(
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
    command = [
        "sbatch",
        "--parsable",
        f"--chdir={tmp_path}",
        "--export=ALL,OMP_NUM_THREADS=1,TORCHDYNAMO_DISABLE=1",
        *options,
    ]
    number = cluster.run(*command, tmp_path / "by-hand.sbatch")
    wait_for_steps(cluster, f"{number}_1", run_dir, life=0, count=SAVE_EVERY + 2)
    cluster.run("scontrol", "update", f"jobid={number}_2", "TimeLimit=2")
    cluster.run("scancel", f"{number}_1")
    wait_for_steps(cluster, f"{number}_2", run_dir, life=1, count=1)
    assert cluster.job(f"{number}_1")["JobState"] == "CANCELLED"
    # torchrun would die of USR1: the ranks look at the clock
    final = stop_soon_after_the_next_start(cluster, f"{number}_2", run_dir)
    assert cluster.wait_for_end(f"{number}_3")["JobState"] == "COMPLETED"
    assert cluster.job(f"{number}_2")["JobState"] == "COMPLETED"
    assert repeated(run_dir, life=2) == 0
    assert_same_run(run_dir, undisturbed(data, tmp_path / "whole", final), steps=final)


def test_three_starts_without_progress_end_the_job_with_the_reason(
    cluster: Cluster, data: DataConfig, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    (number,) = launch(cluster, endless_run(run_dir, data), _HOPELESS)
    assert cluster.wait_for_end(number)["JobState"] == "FAILED"
    assert cluster.job(number)["Restarts"] == "2"
    outcome = (run_dir / "outcome.txt").read_text()
    assert outcome.startswith("gave up: 3 starts in a row brought no new checkpoint")
    # the next job of a chain sees it and costs nothing
    again = cluster.run("sbatch", "--parsable", run_dir / "slurm" / "job.sbatch")
    assert cluster.wait_for_end(again)["JobState"] == "FAILED"
    assert "nothing to do: gave up" in logs(run_dir, f"{again}.out")


def test_the_jobs_of_a_chain_run_one_after_the_other_and_give_up_together(
    cluster: Cluster, data: DataConfig, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    numbers = launch(cluster, endless_run(run_dir, data), _HOPELESS, "--chain", "4")
    states = [cluster.wait_for_end(number)["JobState"] for number in numbers]
    # the third start in vain is the last; the fourth job finds its reason
    assert states == ["COMPLETED", "COMPLETED", "FAILED", "FAILED"]
    starts = (run_dir / "slurm" / "starts.txt").read_text().split()
    assert starts[::2] == [f"{number}-0" for number in numbers[:3]]


def test_a_container_reaches_srun_as_one_word_whatever_its_name(
    cluster: Cluster, data: DataConfig, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    site = f"{_HOPELESS}max_starts_without_progress: 1\ncontainer: {{image: {json.dumps(UGLY)}}}\n"
    (number,) = launch(cluster, endless_run(run_dir, data), site)
    assert cluster.wait_for_end(number)["JobState"] == "FAILED"
    # there is no pyxis here, and srun says what it was given
    assert f"unrecognized option '--container-image={UGLY}'" in logs(run_dir, f"{number}.out")
    assert not list(tmp_path.rglob("pwned"))
