"""A damaged, torn or impossible checkpoint is a clear error on every rank, and the previous one still loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from parallel.checkpoint_config import CheckpointConfig
from tests.parallel import checkpoint_failures as ranks
from tests.spawn import ROOT, run_ranks

pytestmark = pytest.mark.multiprocess


def run_in_a_process(launcher: list[str], mode: str, directory: Path) -> Any:
    """The last line that `python -m tests.parallel.checkpoint_failures MODE DIRECTORY` prints, as JSON."""
    command = [*launcher, sys.executable, "-m", "tests.parallel.checkpoint_failures", mode, str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks saw on a real full disk and a read-only one, in a mount namespace of their own."""
    launcher = ["unshare", "--mount", "--propagation", "private"]
    if subprocess.run([*launcher, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount: the full disk needs a small tmpfs")
    return run_in_a_process(launcher, "disks", tmp_path_factory.mktemp("disks"))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, ranks.failures_of_two, str(tmp_path_factory.mktemp("failures")))


def message(both: list[dict[str, Any]], name: str) -> str:
    """The error of a case, which both ranks must have raised in the same words."""
    first, second = (found[name] for found in both)
    assert first == second, name
    assert first, f"no error: {name}"
    return first


DAMAGES = {
    "truncated": ["__1_0.distcp", "has 1000 bytes", "the manifest lists"],
    "missing": ["__1_0.distcp is missing"],
    "flipped": ["__1_0.distcp has checksum", "content has changed"],
    "manifest": ["manifest.json is corrupted"],
    "manifest not json": ["manifest.json is corrupted", "JSONDecodeError"],
    "no manifest": ["has no manifest.json", "did not finish"],
    "table": ["tensors.json has sha256"],
}
NOT_SEEN_BY_SIZE = {"flipped", "table"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_previous_checkpoint_loads(both: list[dict[str, Any]], damage: str) -> None:
    text = message(both, damage)
    for part in [*DAMAGES[damage], "choose another step"]:
        assert part in text, text
    for found in both:
        assert found[f"{damage}: previous"] == 1.0
        assert found[f"{damage}: newest"] == (2 if damage in NOT_SEEN_BY_SIZE else 1)
        assert found["repaired"] == 2.0


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("missing tensor", ["other is not in it", "must be equal"]),
        ("unexpected tensor", ["table is in it and not in this model"]),
        ("other shape", ["table is ['float32', [8192, 4]] in it and ['float32', [16, 4]] here"]),
        ("other dtype", ["bias is ['float32', [3]] in it and ['float16', [3]] here"]),
        ("no such step", ["step_00000007 has no manifest.json"]),
        ("an object", ["only sharded tensors are stored", "unpickled"]),
        ("twice", ["do not cover themselves exactly once"]),
        ("not json", ["Out of range float values"]),
        ("on one rank", ["only sharded tensors are stored"]),
        ("not a directory", ["a file", "must be writable"]),
    ],
)
def test_misuse_is_named_on_every_rank(both: list[dict[str, Any]], case: str, parts: list[str]) -> None:
    text = message(both, case)
    for part in parts:
        assert part in text, text


def test_weights_load_without_what_is_ignored(both: list[dict[str, Any]]) -> None:
    assert both[0]["ignored"] == 1.0


def test_pickles_in_a_checkpoint_are_never_opened(both: list[dict[str, Any]]) -> None:
    assert both[0]["with a bomb"] == 1.0
    assert not both[0]["exploded"]


def test_a_killed_writer_is_reported_and_cleaned(both: list[dict[str, Any]]) -> None:
    assert "rank 1 cannot write its part" in message(both, "killed writer")
    assert "exit code -9" in both[0]["killed writer"]
    assert both[0]["killed writer: left"] == []


def test_a_hanging_writer_is_ended_after_its_timeout(both: list[dict[str, Any]]) -> None:
    assert "writer of rank 1" in message(both, "hanging writer")
    assert "writer_timeout_s=1" in both[0]["hanging writer"]
    assert both[0]["hanging writer: left"] == []


def test_one_save_in_flight_and_the_next_waits_for_it(both: list[dict[str, Any]]) -> None:
    for found in both:
        assert found["first poll"] is None
        assert found["back-pressure s"] > 0.25
        assert found["published by the next save"] == [2]
        assert (found["wait"], found["wait again"]) == (3, None)
        assert found["values"] == [2.0, 3.0]


def test_retention_keeps_the_newest(both: list[dict[str, Any]]) -> None:
    *steps, names = both[0]["retention"]
    assert steps == [[10], [10, 20], [20, 30], [20, 30]]
    assert names == ["step_00000020", "step_00000030"]


@pytest.mark.parametrize("case", ["full disk", "full disk, background"])
def test_a_full_disk_says_how_much_is_missing_and_leaves_the_previous(
    disks: list[dict[str, Any]], case: str
) -> None:
    assert "bytes are free there" in message(disks, f"{case}: seen before")
    text = message(disks, case)
    for part in (
        "No space left on device",
        "step_00000002",
        "it needs 4194316 bytes",
        "bytes are free",
        "free space",
    ):
        assert part in text, text
    for found in disks:
        assert found[f"{case}: left"] == ["step_00000001"]
        assert found[f"{case}: previous"] == 1.0


def test_a_read_only_directory_is_refused_at_the_start(disks: list[dict[str, Any]]) -> None:
    assert "Read-only file system" in message(disks, "read-only")


def test_sigkill_of_every_rank_during_a_background_save_leaves_the_previous(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="-9"):
        run_ranks(2, ranks.die_during_a_background_save, str(tmp_path), 0.1)
    for found in run_ranks(2, ranks.resume_after_death, str(tmp_path)):
        assert len(found["before"]) == 2 and found["before"][1].startswith("step_00000002.partial-")
        assert (found["newest"], found["value"]) == (1, 1.0)
        assert found["after"] == ["step_00000001"]


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """One process that forks a rank to die at every file operation of a save, and at several moments."""
    return run_in_a_process([], "crashes", tmp_path_factory.mktemp("crashes"))


def test_a_crash_between_any_two_file_operations_loses_nothing(
    crashes: dict[str, list[dict[str, Any]]],
) -> None:
    points = crashes["operations"]
    assert len(points) > 20, "every file operation of a save, a replacement and a removal is a point"
    assert [point["killed"] for point in points] == [True] * (len(points) - 1) + [False]
    for point in points:
        assert (point["newest"], point["value"]) in {(2, 2.0), (2, 2.5), (3, 3.0)}, point
        assert not [name for name in point["names"] if "." in name], point
    assert {point["value"] for point in points} == {2.0, 2.5, 3.0}


def test_sigkill_at_any_moment_of_a_background_save_leaves_the_previous(
    crashes: dict[str, list[dict[str, Any]]],
) -> None:
    for moment in crashes["times"]:
        assert moment["killed"], moment
        assert (moment["newest"], moment["value"]) in {(1, 1.0), (2, 2.0)}, moment
        assert moment["writer"] in ("", "Z"), "a writer dies with its rank"
    assert crashes["times"][0]["newest"] == 1


def test_config_refuses_what_makes_no_sense() -> None:
    for options in ({"keep": -1}, {"every_steps": -2}, {"writer_timeout_s": 0.0}):
        (name, value), *_ = options.items()
        with pytest.raises(ValueError, match=rf"checkpoint\.{name}={value}.*must be"):
            CheckpointConfig(**options)  # type: ignore[arg-type]
