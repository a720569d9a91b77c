"""Node-local copies: whatever one node loses, the run goes on from the newest step that is whole somewhere, bit for
bit; nothing half written, damaged or of another way of the run is ever taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_m1.insertion import undo
from parallel.checkpoint_config import LocalConfig
from parallel.manifest import set_aside, timeline
from tests.parallel import local_ranks as ranks
from tests.spawn import run_ranks

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(4, ranks.damaged_and_resumed, str(tmp_path_factory.mktemp("copies")))[0]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(4, ranks.small_cases, str(tmp_path_factory.mktemp("small")))[0]


def differing(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    assert left.keys() == right.keys(), left.keys() ^ right.keys()
    return [key for key in left if not torch.equal(left[key], right[key])]


def test_each_node_keeps_the_newest_two_of_its_ranks_and_of_its_peers(found: dict[str, Any]) -> None:
    places = [Path(path).parts for path in found["kept"]]
    assert sorted((node, rank, step) for node, _, _, rank, step in places) == [
        (node, f"rank_0000{rank}", f"step_0000000{step}")
        for node in ("n0", "n1")
        for rank in range(4)
        for step in (3, 5)
    ]


@pytest.mark.parametrize(
    ("damage", "step"),
    [
        ("nothing", 5), ("lose_node", 5), ("lose_peer_copies", 5), ("lose_newest_on_both", 3), ("corrupt_own", 5),
        ("corrupt_both", 3), ("tear", 5), ("leave_unfinished", 3), ("mix_lives", 3),
    ],
)  # fmt: skip
def test_a_start_goes_on_bit_for_bit_from_the_newest_step_that_is_whole_somewhere(
    found: dict[str, Any], damage: str, step: int
) -> None:
    after = found["after"][damage]
    assert after["step"] == step
    assert after["extra"] == {"position": step}
    assert differing(after["loaded"], found[step]) == []
    assert differing(after["trained on"], found["straight"]) == []
    # and the states of different steps do differ
    assert differing(found[3], found[5])


def test_what_is_lost_on_both_nodes_is_not_made_up(found: dict[str, Any]) -> None:
    after = found["after"]["lose_both"]
    assert after["step"] is None
    assert any("no node has ranks [3]" in text for text in after["heard"][0])
    # later steps than the one that is gone on from would be of another life
    assert after["left"] == []


def test_a_lost_node_has_its_own_shards_again(found: dict[str, Any]) -> None:
    left = {Path(path).parts[0::3] for path in found["after"]["lose_node"]["left"]}
    assert {("n1", "rank_00002"), ("n1", "rank_00003")} <= left


def test_damage_is_told_with_the_place_where_the_shard_comes_from(found: dict[str, Any]) -> None:
    (said,) = found["after"]["corrupt_own"]["heard"][0]
    assert said.startswith("rank 2 cannot use the node-local copy of step 5 on n1 (")
    assert "has checksum" in said and said.endswith("next: ['n0']")
    torn = found["after"]["tear"]["heard"]
    assert "has no manifest.json" in torn[2][0] and "has 100 bytes" in torn[0][0]
    assert found["after"]["nothing"]["heard"] == [[], [], [], []]
    # both holders are tried and told
    assert [text.rpartition("next: ")[2] for text in found["after"]["corrupt_both"]["heard"][0][:2]] == [
        "['n0']",
        "none",
    ]


def test_later_steps_that_were_not_used_are_gone(found: dict[str, Any]) -> None:
    for damage in ("lose_newest_on_both", "corrupt_both", "leave_unfinished", "mix_lives"):
        assert {Path(path).name for path in found["after"][damage]["left"]} == {"step_00000003"}, damage


def test_copies_count_only_where_they_are_not_older_than_the_shared_checkpoint(small: dict[str, Any]) -> None:
    assert small["below the shared one"] is None
    assert small["as new as the shared one"] == 4


@pytest.mark.parametrize("what", ["of another run", "on another way", "of another layout"])
def test_copies_of_something_else_are_not_used(small: dict[str, Any], what: str) -> None:
    assert small[what] is None


def test_a_way_that_was_given_up_leaves_nothing(small: dict[str, Any]) -> None:
    assert small["left of the way before"] == 0


def test_a_full_disk_costs_a_copy_and_a_warning(small: dict[str, Any]) -> None:
    assert small["partial"] == []
    first, second, third, fourth = small["after a full disk"]
    assert (first, second, fourth) == ([], [], [])
    assert len(third) == 1 and third[0].startswith("no node-local copy on n1: OSError: [Errno 27]"), third
    assert small["newest"] == 8


def test_one_broken_disk_costs_its_copies_and_a_warning(small: dict[str, Any]) -> None:
    assert small["on n0 alone"] == sorted(f"rank_0000{rank}" for rank in range(4) for _ in (1, 2))
    # its ranks have nowhere to put what the other node has
    assert small["with one broken disk"] is None
    first, second, third, fourth = small["told of broken disks"]
    assert third == ["no node-local copies here", "no node-local copy on n1"]
    assert (second, fourth) == ([], ["no node-local copy on n1"])
    assert first[-1] == "node-local copies of step 1 are not used"


def test_a_directory_that_no_node_can_have_is_refused(small: dict[str, Any]) -> None:
    assert "cannot be used on n0 by rank 0" in small["refused"]
    assert "every node needs a directory there" in small["refused"]


def test_without_a_peer_a_node_keeps_its_own(small: dict[str, Any]) -> None:
    places = [Path(path).parts for path in small["without a peer"]]
    assert sorted((node, rank) for node, _, _, rank, _ in places) == [
        (f"n{rank // 2}", f"rank_0000{rank}") for rank in range(4)
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"directory": "scratch"}, "is relative"),
        ({"every_steps": 0}, "must be 1 or more"),
        ({"keep": 1}, "must be 2 or more"),
    ],
)
def test_a_wrong_setting_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalConfig(**values)


@pytest.mark.parametrize("go_back", [lambda run: set_aside(run / "checkpoints", 1), lambda run: undo(run, 1)])
def test_a_run_that_goes_back_goes_another_way(go_back: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    before = timeline(tmp_path / "checkpoints")
    assert timeline(tmp_path / "checkpoints") == before
    go_back(tmp_path)
    assert timeline(tmp_path / "checkpoints") != before
