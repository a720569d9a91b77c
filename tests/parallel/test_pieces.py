"""Pieces are read by turns, on this thread and others: each once, and none after an error."""

from __future__ import annotations

import os
import threading
import time

import pytest

from parallel.pieces import take_turns


def test_every_item_is_done_once_and_this_thread_takes_part() -> None:
    done: list[tuple[int, int]] = []

    def do(item: int) -> None:
        time.sleep(0.001)
        done.append((item, threading.get_ident()))

    take_turns(do, range(100))
    assert sorted(item for item, _ in done) == list(range(100))
    assert threading.get_ident() in {thread for _, thread in done}
    done.clear()
    take_turns(do, [7])
    assert done == [(7, threading.get_ident())]
    take_turns(do, [])


@pytest.mark.parametrize("on_this_thread", [True, False])
def test_an_error_is_raised_and_the_rest_is_left(on_this_thread: bool) -> None:
    if not on_this_thread and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core, so there is no other thread")
    begun: list[int] = []

    def do(item: int) -> None:
        begun.append(item)
        time.sleep(0.001)
        if (threading.current_thread() is threading.main_thread()) == on_this_thread and item >= 10:
            raise OSError("no such piece")

    with pytest.raises(OSError, match="no such piece"):
        take_turns(do, range(10**4))
    assert len(begun) < 10**4
