"""A rank that does not come is named, with the call it did not come to; the stacks of all ranks are in the report."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel import hang as hang_module
from parallel.hang import HANG_EXIT_CODE, REPORT_NAME, Call, Watchdog, first_divergence, waits_for_others
from parallel.launch import connect, host_local_ranks, read_environment
from tests.spawn import ROOT, _forking


def call(
    number: int, *, name: str = "all_reduce [[8]]", finished: bool = True, time_ns: int = 0, **where
) -> Call:
    about = {"group": "0", "ranks": (0, 1, 2, 3)} | where
    return Call(
        number=number, name=name, finished=finished, time_ns=time_ns or number, place="x.py:1 f", **about
    )


def test_a_rank_that_has_not_entered_the_call_of_the_others_is_named() -> None:
    journals = {rank: [call(1), call(2, finished=False)] for rank in (0, 1, 3)} | {2: [call(1)]}
    found = first_divergence(journals, 4)
    assert found.rank == 2
    assert "has not come to all_reduce [[8]], call 2 of group 0" in found.sentence


def test_waits_are_followed_through_other_groups_to_the_first_rank() -> None:
    # 0 and 1 wait for 2 in the whole group; 2 waits for 3 in a smaller one; 3 is somewhere else
    pair = {"group": "tp", "ranks": (2, 3)}
    journals = {
        0: [call(1, finished=False, time_ns=5)],
        1: [call(1, finished=False, time_ns=6)],
        2: [call(7, finished=False, time_ns=9, **pair)],
        3: [call(6, **pair)],
    }
    assert first_divergence(journals, 4).rank == 3


def test_a_silent_rank_is_named() -> None:
    journals = {rank: [call(1, finished=False)] for rank in (0, 2, 3)}
    found = first_divergence(journals, 4)
    assert (found.rank, "wrote nothing" in found.sentence) == (1, True)


def test_a_silent_rank_is_named_also_where_nobody_waits_for_it_in_a_journal() -> None:
    # stage 0 waits for a message of stage 1, which gloo does not record; in stage 1 rank 2 waits for rank 3
    first, second = {"group": "tp", "ranks": (0, 1)}, {"group": "tp", "ranks": (2, 3)}
    journals = {
        0: [call(8, finished=False, time_ns=5, **first)],
        1: [call(7, **first)],
        2: [call(9, finished=False, time_ns=6, **second)],
    }
    found = first_divergence(journals, 4)
    assert found.rank == 3
    assert "rank 3 wrote nothing" in found.sentence and "call 9 of group tp" in found.sentence
    # and where it is not stopped but somewhere else, the stacks tell that it waits for nobody
    journals[3] = [call(8, **second)]
    found = first_divergence(journals, 4, busy=[3])
    assert found.rank == 3
    assert "rank 3 has not come to all_reduce [[8]], call 9 of group tp" in found.sentence


def test_a_lock_that_is_waited_for_is_no_collective() -> None:
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    assert not waits_for_others()
    ended.set()
    thread.join()


def test_another_operation_or_shape_is_named() -> None:
    journals = {rank: [call(1), call(2, finished=False)] for rank in (0, 1, 3)}
    journals[2] = [call(1), call(2, name="all_gather [[8]]", finished=False)]
    assert "rank 2 entered all_gather [[8]]" in first_divergence(journals, 4).sentence


def test_a_message_waits_for_its_peer() -> None:
    pair = {"group": "pp", "ranks": (0, 1)}
    journals = {
        0: [call(3, name="recv 0<-1", finished=False, **pair)],
        1: [call(2, name="send 1->0", **pair)],
    }
    assert first_divergence(journals, 2).rank == 1


def hang(directory: Path, fault: str, environment: dict[str, str]) -> None:
    """One of four ranks: three steps, then rank 3 does not come to the others."""
    os.environ.clear()
    os.environ.update(environment)
    import tests.rank_template  # noqa: F401

    launch = read_environment()
    connect(launch)
    if fault == "groups":
        _make_groups_without_rank_3(directory, launch.rank)
    pair, other = dist.new_group([2, 3]), dist.new_group([0, 1])
    if fault == "slow":
        _gather_slowly(launch.rank)
    with Watchdog(directory, timeout_s=2.0, rank=launch.rank, world_size=4) as watchdog:
        for _ in range(3):
            dist.all_reduce(torch.ones(4))
            watchdog.beat()
        (directory / f"here{launch.rank}").touch()
        if launch.rank == 3:
            time.sleep(600)
        if launch.rank == 0 and fault == "message":
            dist.recv(torch.ones(4), src=2)
        if launch.rank < 2 and fault == "message":
            dist.all_reduce(torch.ones(7), group=other)
        if launch.rank == 2:
            dist.all_reduce(torch.ones(5), group=pair)
        dist.all_reduce(torch.ones(6))
        time.sleep(600)


def _make_groups_without_rank_3(directory: Path, rank: int) -> None:
    """A start that hangs before there is a collective."""
    with Watchdog(directory, timeout_s=2.0, rank=rank, world_size=4) as watchdog:
        watchdog.beat()
        if rank == 3:
            time.sleep(600)
        dist.new_group(range(4))


def _gather_slowly(rank: int) -> None:
    """Rank 3 still gathers its evidence when the others' patience with silent ranks has ended."""
    hang_module._GRACE_S = 0.5
    if rank == 3:
        real = hang_module.read_journal
        hang_module.read_journal = lambda rank: (time.sleep(4), real(rank))[1]


@pytest.mark.multiprocess
@pytest.mark.parametrize("fault", ["sleep", "stop", "message", "slow", "groups"])
def test_a_real_hang_ends_with_a_report_that_names_the_rank_and_its_place(fault: str, tmp_path: Path) -> None:
    store, meeting = host_local_ranks(4)
    shared = {**os.environ, **meeting, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    ranks = [
        _forking().Process(
            target=hang, args=(tmp_path, fault, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        )
        for rank in range(4)
    ]
    try:
        for process in ranks:
            process.start()
        if fault == "stop":
            _wait_for(tmp_path / "here3")
            assert ranks[3].pid is not None
            os.kill(ranks[3].pid, signal.SIGSTOP)
        ended = ranks[:3] if fault == "stop" else ranks
        for process in ended:
            process.join(120)
        codes = [process.exitcode for process in ended]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    del store
    # the first rank that ends breaks the connections of the others
    assert HANG_EXIT_CODE in codes and 0 not in codes and None not in codes, codes
    report = (tmp_path / REPORT_NAME).read_text()
    if fault == "groups":
        assert report.startswith(
            "HANG: rank 3 has not come to where the others wait, and no collective of theirs"
        )
        assert "dist.new_group(range(4))" in report
        return
    if fault == "stop":
        assert report.startswith("HANG: rank 3 wrote nothing")
        assert "rank 3: wrote nothing" in report
    else:
        assert report.startswith("HANG: rank 3 has not come to all_reduce [[5]]")
        assert "time.sleep(600)" not in report.split("==== rank 0 ====")[0]
        assert "==== rank 3 ====" in report
    # rank 2 waits in the small group for it
    assert "rank 2: in all_reduce [[5]]" in report
    if fault == "message":
        # rank 1 waits for rank 0, and that one for a message of rank 2, which is in no journal of gloo's
        assert "rank 1: in all_reduce [[7]]" in report
    else:
        # the others wait in the large one for rank 2
        assert "rank 0: in all_reduce [[6]]" in report


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)
