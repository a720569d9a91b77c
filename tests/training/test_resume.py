"""A run that is killed and resumed is the uninterrupted run, bit for bit; under another layout, to tolerance."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig
from megatron_m1.training.spool import read_steps
from tests import tolerances
from tests.training import lives
from tests.training.tiny_run import SMALLEST, data_in, write_run_file, write_shards

pytestmark = pytest.mark.multiprocess

STEPS = 12
MODEL = {"model": SMALLEST["model"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Two small shards."""
    directory = tmp_path_factory.mktemp("data")
    write_shards(directory)
    return data_in(directory)


@pytest.fixture(scope="module")
def uninterrupted(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of a run that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    life = lives.start(write_run_file(run_dir, data, steps=STEPS, **MODEL))
    assert life.wait(300) == 0
    return run_dir


def test_a_run_killed_at_random_moments_equals_the_uninterrupted_one(
    data: DataConfig, uninterrupted: Path, tmp_path: Path
) -> None:
    run_file = write_run_file(tmp_path / "killed", data, steps=STEPS, **MODEL)
    moments = random.Random(os.getpid())
    # a user's start and its launcher are killed as whole as ranks are
    for life, start in enumerate((lives.start_command, lives.start)):
        process = start(run_file)
        lives.wait_for_step(tmp_path / "killed", process, 3 + 4 * life)
        time.sleep(moments.uniform(0.0, 0.5))
        lives.kill(process)
    assert lives.start(run_file).wait(300) == 0
    lives.assert_same_run(tmp_path / "killed", uninterrupted, steps=STEPS)


def test_a_run_killed_during_a_save_equals_the_uninterrupted_one(
    data: DataConfig, uninterrupted: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "torn"
    run_file = write_run_file(run_dir, data, steps=STEPS, **MODEL)
    process = lives.start(run_file)
    # the next life has a checkpoint to go on from, and a torn one to leave alone
    lives.wait_for_checkpoint(run_dir, process, 2)
    deadline = time.monotonic() + 120
    # a save is under way while its directory has not got its final name
    while not list((run_dir / "checkpoints").glob("*partial*")):
        assert process.poll() is None, "the run ended before a save was seen"
        assert time.monotonic() < deadline
    lives.kill(process)
    assert lives.start(run_file).wait(300) == 0
    lives.assert_same_run(run_dir, uninterrupted, steps=STEPS)


def test_a_run_resumed_under_other_layouts_stays_the_same_to_tolerance(
    data: DataConfig, uninterrupted: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "resharded"
    first = write_run_file(run_dir, data, steps=STEPS, **MODEL)
    life = lives.start(first)
    lives.wait_for_step(run_dir, life, 5)
    lives.kill(life)
    for layout, steps in (("{cp: 2}", 8), ("{tp: 2, pp: 2, etp: 2}", STEPS)):
        text = first.read_text().replace("layout: {tp: 2, ep: 2}", f"layout: {layout}")
        text = text.replace(f"steps: {STEPS}", f"steps: {steps}")
        other = tmp_path / "other.yaml"
        other.write_text(text)
        assert lives.start(other).wait(300) == 0
    ours, theirs = read_steps(run_dir / "metrics.jsonl"), read_steps(uninterrupted / "metrics.jsonl")
    for step in range(1, STEPS + 1):
        assert ours[step]["sample_ids_hash"] == theirs[step]["sample_ids_hash"]
        assert ours[step]["loss_nats"] == pytest.approx(theirs[step]["loss_nats"], rel=10 * tolerances.LOSS)
