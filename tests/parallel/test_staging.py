"""A bounded ring holds a state on its way to the writer: memory stays under the bound, and every tensor arrives."""

from __future__ import annotations

import itertools
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from parallel import shards
from parallel.staging import Place, plan_places
from tests.parallel.checkpoint_failures import error_of, groups_of_all, open_store, replaced
from tests.spawn import run_ranks

TENSORS, MIB_EACH, STAGING_MIB = 16, 4, 8


def test_places_by_hand() -> None:
    # 64-byte steps; the third does not fit behind the second, so it waits until the first has left
    assert plan_places([40, 40, 40], 128) == [Place(0, 0), Place(64, 0), Place(0, 1)]
    # as large as the ring: each waits for all before it
    assert plan_places([128, 128, 128], 128) == [Place(0, 0), Place(0, 1), Place(0, 2)]


@given(st.lists(st.integers(0, 300), max_size=40), st.integers(300, 900))
def test_tensors_in_the_ring_never_overlap(sizes: list[int], capacity: int) -> None:
    places = plan_places(sizes, capacity)
    for number, (place, size) in enumerate(zip(places, sizes, strict=True)):
        assert place.offset + size <= capacity
        assert place.after <= number
        for other in range(place.after, number):
            apart = (
                place.offset + size <= places[other].offset
                or places[other].offset + sizes[other] <= place.offset
            )
            assert apart, (number, other)


def numbers(index: int) -> torch.Tensor:
    return torch.arange(MIB_EACH << 18, dtype=torch.float32) + index


def save_staged(directory: str) -> dict[str, Any]:
    """What a save of 64 MiB through 8 MiB costs in memory while the trainer changes every tensor."""
    groups = groups_of_all()
    store = open_store(directory, groups, staging_mib=STAGING_MIB)
    state = {f"w{i}": ShardedTensor.from_rank_offsets(f"w{i}", numbers(i)) for i in range(TENSORS)}
    write, found = shards._write_item, {}
    in_turn, measured = itertools.count(), Path(directory) / "measured"

    def slow(*arguments: Any) -> Any:
        # the last tensors are on their way until their memory has been looked at
        while next(in_turn, 0) >= TENSORS - 1 and not measured.exists():
            time.sleep(0.01)
        return write(*arguments)

    with replaced(shards, "_write_item", slow):
        store.save(1, state, {})
        for leaf in state.values():
            leaf.data.fill_(-1.0)
        assert store._flight is not None and store._flight.call._process is not None
        found["still writing"] = store._flight.call.running
        found["writer MiB"] = _own_mib(store._flight.call._process.pid)
        measured.touch()
        store.wait()
    template = {
        f"w{i}": ShardedTensor.from_rank_offsets(f"w{i}", torch.zeros(MIB_EACH << 18)) for i in range(TENSORS)
    }
    loaded, _ = store.load(1, template)
    found["wrong"] = [i for i in range(TENSORS) if not torch.equal(loaded[f"w{i}"], numbers(i))]
    small = open_store(f"{directory}/small", groups, staging_mib=2)
    found["too small"] = error_of(lambda: small.save(1, state, {}))
    found["left"] = [path.name for path in Path(f"{directory}/small").iterdir()]
    return found


def _own_mib(pid: int | None) -> float:
    """Memory that would be free if the process were not there: its own pages, and its half of the shared ring."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    own = sum(
        int(re.findall(rf"^{name}: +(\d+) kB", text, re.MULTILINE)[0])
        for name in ("Private_Dirty", "Pss_Shmem")
    )
    return own / 1024


@pytest.mark.multiprocess
def test_a_save_larger_than_its_buffer_stays_under_it_and_arrives(tmp_path: Path) -> None:
    (found,) = run_ranks(1, save_staged, str(tmp_path))
    assert found["wrong"] == []
    assert found["still writing"]
    # the rest is what the interpreter writes into its own pages; a snapshot by fork holds all 64 MiB too
    assert found["writer MiB"] < STAGING_MIB + 40, found["writer MiB"]
    for part in ("checkpoint.staging_mib=2 is less", "4.0 MiB", "use 4 or more"):
        assert part in found["too small"]
    assert found["left"] == []


def test_a_dead_writer_does_not_hold_the_trainer(tmp_path: Path) -> None:
    (found,) = run_ranks(1, save_with_a_dying_writer, str(tmp_path))
    assert "ended with exit code -9" in found


def save_with_a_dying_writer(directory: str) -> str:
    store = open_store(directory, groups_of_all(), staging_mib=STAGING_MIB)
    state = {f"w{i}": ShardedTensor.from_rank_offsets(f"w{i}", numbers(i)) for i in range(4)}
    with replaced(shards, "_write_item", lambda *_: os.kill(os.getpid(), 9)):
        return error_of(lambda: (store.save(1, state, {}), store.wait()))
