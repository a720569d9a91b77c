"""Jobs on a real Slurm: whatever ends a life, the next one repeats at most the steps since the last save, and the
losses are those of the run that nobody disturbed, bit for bit.

Chains and jobs that give up are in test_chains.py, what takes Slurm minutes in test_long_jobs.py.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.jobs import (
    SAVE_EVERY,
    UGLY,
    end_after,
    endless_run,
    launch,
    logs,
    periodic_saves,
    ranks_on,
    repeated,
    undisturbed,
    wait_for_steps,
)
from tests.training.lives import assert_same_run, steps_by_life

pytestmark = pytest.mark.multiprocess


def test_a_job_outlives_a_full_disk_preemption_a_drained_node_a_crash_and_a_power_cut(
    cluster: Cluster, data: DataConfig, tmp_path: Path
) -> None:
    run_dir = tmp_path / UGLY / "run"
    cluster.fill_local_disk("n0")
    (number,) = launch(cluster, endless_run(run_dir, data, local=cluster.local))
    # the first start finds the full disk and excludes its node
    wait_for_steps(cluster, number, run_dir, life=0, count=2)
    assert cluster.job(number)["Restarts"] == "1"
    assert "bad node n0: 0.00 GiB free for temporary files" in logs(run_dir, f"{number}-0.*preflight*")
    assert cluster.job(number)["ExcNodeList"] == "n0"
    # preemption says TERM: the ranks agree, save and leave, so nothing is repeated; a drained node is not used again
    drained = cluster.nodes_of(number)[0]
    cluster.run("scontrol", "update", f"nodename={drained}", "state=drain", "reason=test")
    cluster.run("scontrol", "requeue", number)
    wait_for_steps(cluster, number, run_dir, life=1, count=SAVE_EVERY + 2)
    assert repeated(run_dir, life=1) == 0
    assert {drained, "n0"}.isdisjoint(cluster.nodes_of(number))
    cluster.run("scontrol", "update", f"nodename={drained}", "state=resume")
    # one rank dies, the others get TERM from srun: what they might save would not be a step of the whole run
    os.kill(ranks_on(cluster, cluster.nodes_of(number)[1])[0], signal.SIGKILL)
    wait_for_steps(cluster, number, run_dir, life=2, count=SAVE_EVERY + 2)
    assert steps_by_life(run_dir)[2][0] in periodic_saves(run_dir)
    # a power cut takes the node's disk with it; somebody tells Slurm, which would find out by itself
    lost, left = cluster.nodes_of(number)
    cluster.kill_node(lost)
    final = end_after(run_dir, steps_by_life(run_dir)[2][1][-1] + 3)
    cluster.run("scontrol", "update", f"nodename={lost}", "state=down", "reason=power")
    assert cluster.wait_for_end(number)["JobState"] == "COMPLETED", logs(run_dir, "*")
    assert lost not in cluster.nodes_of(number) and left in cluster.nodes_of(number)
    # what the lost node had is on the other one's disk
    assert "have their node-local copies of step" in logs(run_dir, f"{number}-4.*train.0.log")
    assert 0 <= repeated(run_dir, life=3) <= 2 * SAVE_EVERY
    assert (run_dir / "outcome.txt").read_text() == f"finished at step {final}\n"
    assert not list(tmp_path.rglob("pwned"))
    assert_same_run(run_dir, undisturbed(data, tmp_path / "whole", final), steps=final)
    cluster.start_node(lost)
    # Slurm takes it back by itself
    wait_until(lambda: lost in cluster.nodes_that_are("idle"), 60)
