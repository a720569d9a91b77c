"""Who started this process, and what happens to local ranks when one of them fails."""

from __future__ import annotations

import pytest

from parallel.launch import (
    job_ends_at_s,
    meeting_place,
    read_environment,
    run_local_ranks,
    threads_per_rank,
)


def test_alone_is_rank_zero_of_one() -> None:
    launch = read_environment({})
    assert (launch.rank, launch.world_size, launch.launcher) == (0, 1, "single")


def test_torchrun_wins_over_the_allocation_it_runs_in() -> None:
    environment = {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "SLURM_PROCID": "0",
        "SLURM_STEP_ID": "0",
    }
    launch = read_environment(environment)
    assert (launch.rank, launch.world_size, launch.local_rank, launch.launcher) == (5, 8, 1, "torchrun")


def test_srun_gives_the_rank_but_a_bare_batch_script_does_not() -> None:
    step = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
    assert read_environment(step).launcher == "single"
    launch = read_environment(step | {"SLURM_STEP_ID": "0"})
    assert (launch.rank, launch.world_size, launch.local_rank, launch.launcher) == (3, 4, 1, "srun")


@pytest.mark.parametrize("broken", [{"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, {"RANK": "0"}])
def test_a_broken_launcher_environment_is_named(broken: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"environment variable \w+='\w+' is not a whole number"):
        read_environment(broken)


def test_the_first_failing_rank_ends_the_job_with_its_code() -> None:
    # an unknown command: every rank exits with typer's usage error, none is left behind
    assert run_local_ranks(2, ["no-such-command"], grace_s=5.0) == 2


def test_local_ranks_share_the_cores_unless_the_user_says_how_many_threads(monkeypatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 9)
    assert [threads_per_rank(ranks, {}) for ranks in (1, 2, 16)] == ["9", "4", "1"]
    assert threads_per_rank(2, {"OMP_NUM_THREADS": "3"}) == "3"


def test_the_end_of_a_job_is_known_only_where_a_batch_system_says_it() -> None:
    assert job_ends_at_s({"SLURM_JOB_END_TIME": "1795514400"}) == 1795514400.0
    assert job_ends_at_s({}) is None
    # Slurm's word where there is no limit
    assert job_ends_at_s({"SLURM_JOB_END_TIME": "Unknown"}) is None


def test_the_meeting_place_is_the_launchers() -> None:
    assert meeting_place({"MASTER_ADDR": "n0", "MASTER_PORT": "20001"}) == ("n0", 20001)
    with pytest.raises(ValueError, match="MASTER_ADDR is not set"):
        meeting_place({})
    with pytest.raises(ValueError, match="MASTER_PORT='x' is not a whole number"):
        meeting_place({"MASTER_ADDR": "n0", "MASTER_PORT": "x"})
