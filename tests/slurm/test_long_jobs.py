"""What takes a real Slurm minutes: to find out about a power cut by itself, and to end a job at its wall-time."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.config import DataConfig
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import (
    endless_run,
    launch,
    logs,
    repeated,
    stop_soon_after_the_next_start,
    undisturbed,
    wait_for_steps,
)
from tests.training.lives import assert_same_run

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def test_a_job_outlives_an_unnoticed_power_cut_and_the_wall_time(
    cluster: Cluster, data: DataConfig, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    (number,) = launch(cluster, endless_run(run_dir, data))
    wait_for_steps(cluster, number, run_dir, life=0, count=2)
    # nobody is told: Slurm finds out and queues the job again
    lost = cluster.nodes_of(number)[0]
    cluster.kill_node(lost)
    wait_for_steps(cluster, number, run_dir, life=1, count=2)
    assert lost not in cluster.nodes_of(number)
    cluster.start_node(lost)
    # the wall-time is about to end: USR1 comes first
    minutes, seconds = (int(part) for part in cluster.job(number)["RunTime"].split(":")[1:])
    limit = (60 * minutes + seconds + 55) // 60 + 1
    cluster.run("scontrol", "update", f"jobid={number}", f"TimeLimit={limit}")
    final = stop_soon_after_the_next_start(cluster, number, run_dir)
    cluster.run("scontrol", "update", f"jobid={number}", "TimeLimit=30")
    assert cluster.wait_for_end(number)["JobState"] == "COMPLETED"
    assert repeated(run_dir, life=2) == 0
    assert (run_dir / "outcome.txt").read_text() == f"finished at step {final}\n"
    assert "queued again: stopped after step" in logs(run_dir, f"{number}.out")
    assert_same_run(run_dir, undisturbed(data, tmp_path / "whole", final), steps=final)
