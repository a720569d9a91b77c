"""Who does not come to the start of a job is named soon, on every rank that did; so is who read another run."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch.distributed as dist

from parallel.arrival import ArrivalError
from parallel.launch import connect, host_local_ranks, read_environment
from tests.spawn import ROOT, _forking

pytestmark = pytest.mark.multiprocess
# more than ranks of a busy machine are apart
SHORT_S, LONG_S = 4.0, 60.0


def come(place: Path, run: str, patience_s: float, environment: Mapping[str, str]) -> None:
    """One rank: what became of its start, in a file."""
    os.environ.clear()
    os.environ.update(environment)
    import tests.rank_template  # noqa: F401

    launch = read_environment()
    try:
        connect(launch, run=run, timeout_s=patience_s)
        dist.destroy_process_group()
        text = "connected"
    except ArrivalError as error:
        text = str(error)
    (place / f"rank{launch.rank}").write_text(text)


def start(
    place: Path, runs: Mapping[int, str], meeting: Mapping[str, str], patience_s: float = SHORT_S
) -> dict[int, str]:
    """Start some of three ranks, each with its run; what each of them says."""
    shared = {**os.environ, **meeting, "WORLD_SIZE": "3", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    ranks = []
    for rank, run in runs.items():
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "SLURMD_NODENAME": f"n{rank}"}
        ranks.append(_forking().Process(target=come, args=(place, run, patience_s, shared | own)))
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return {rank: (place / f"rank{rank}").read_text() for rank in runs}


def kept_by_rank_0() -> dict[str, str]:
    """As srun starts ranks: nobody keeps a store for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


def test_ranks_that_all_come_with_the_same_run_connect(tmp_path: Path) -> None:
    said = start(tmp_path, dict.fromkeys(range(3), "run"), kept_by_rank_0(), LONG_S)
    assert set(said.values()) == {"connected"}


def test_a_rank_that_never_comes_is_named_on_all_that_came(tmp_path: Path) -> None:
    said = start(tmp_path, dict.fromkeys((0, 1), "run"), kept_by_rank_0())
    assert said[0].startswith(
        "rank 2 did not come within 4 s; there are ranks 0, 1 on n0, n1: a job starts with"
    )
    # rank 0 keeps the store, and stays until the others have read why
    assert said[1] == said[0]


def test_where_rank_0_never_comes_the_others_say_so(tmp_path: Path) -> None:
    for rank, text in start(tmp_path, dict.fromkeys((1, 2), "run"), kept_by_rank_0()).items():
        assert text.startswith(f"rank {rank} finds nobody at 127.0.0.1:")
    store, meeting = host_local_ranks(3)
    for text in start(tmp_path, dict.fromkeys((1, 2), "run"), meeting).values():
        assert text.startswith("rank 0 did not come within 4 s: a job starts with")
    del store


def test_a_rank_that_read_another_run_is_named(tmp_path: Path) -> None:
    store, meeting = host_local_ranks(3)
    said = start(tmp_path, {0: "run", 1: "other", 2: "run"}, meeting, LONG_S)
    del store
    assert len(set(said.values())) == 1
    assert said[0].startswith("rank 1 (first on n1) read another run than rank 0 on n0")


def test_ranks_that_torchrun_starts_again_are_not_told_of_the_first_start(tmp_path: Path) -> None:
    store, meeting = host_local_ranks(3)
    first = start(tmp_path, dict.fromkeys((0, 1), "run"), meeting)
    assert all(text.startswith("rank 2 did not come") for text in first.values())
    again = meeting | {"TORCHELASTIC_RESTART_COUNT": "1"}
    said = start(tmp_path, dict.fromkeys(range(3), "run"), again, LONG_S)
    del store
    assert set(said.values()) == {"connected"}


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = start(tmp_path, {0: "run"}, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    assert said[0].startswith(f"rank 0 cannot keep the meeting place at 127.0.0.1:{port}")
