"""A run of stages: every boundary changes rows, rotary base and layout; killed around them it stays the same run."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from megatron_m1.training.spool import read_steps
from tests.training import lives
from tests.training.tiny_run import SMALLEST, data_in, write_run_file, write_shards

pytestmark = pytest.mark.multiprocess

STAGES = """
stages:
  - {name: short, training: {steps: 4}}
  - name: middle
    model: {rotary_base: 40000.0}
    layout: {tp: 1, cp: 2}
    training: {steps: 3, sequence_length: 128}
    schedule: {peak_learning_rate: 1.0e-3, batch_ramp: [{from_tokens: 0, global_batch_tokens: 512}]}
  - name: long
    model: {rotary_base: 160000.0}
    layout: {tp: 1, pp: 2, ep: 1}
    training: {steps: 3, sequence_length: 256}
    schedule: {peak_learning_rate: 5.0e-4, batch_ramp: [{from_tokens: 0, global_batch_tokens: 512}]}
"""
STEPS = 10


def test_a_staged_run_killed_around_its_boundaries_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    write_shards(tmp_path)
    data = data_in(tmp_path)
    whole, killed = (_run_file(tmp_path / name, data) for name in ("whole", "killed"))
    life = lives.start(whole)
    assert life.wait(300) == 0
    for step in (4, 7):
        process = lives.start(killed)
        lives.wait_for_step(tmp_path / "killed", process, step)
        # somewhere in the save at the boundary, in the change of layouts, or in the next stage
        lives.kill(process, after_s=random.uniform(0.0, 1.0))
    assert lives.start(killed).wait(300) == 0
    lives.assert_same_run(tmp_path / "killed", tmp_path / "whole", steps=STEPS)


def test_a_signal_ends_a_staged_run_and_the_next_life_ends_it(tmp_path: Path) -> None:
    write_shards(tmp_path)
    run_file = _run_file(tmp_path / "run", data_in(tmp_path))
    # whoever has started local ranks passes the signal on
    process = lives.start_command(run_file)
    lives.wait_for_step(tmp_path / "run", process, 5)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(300) == 0
    outcome = (tmp_path / "run" / "outcome.txt").read_text()
    if not outcome.startswith("finished"):
        assert outcome.startswith("stopped after step")
        assert lives.start(run_file).wait(300) == 0
    steps = read_steps(tmp_path / "run" / "metrics.jsonl")
    assert list(steps) == list(range(1, STEPS + 1))
    # learning rate and batch begin anew with each stage; tokens count on
    assert [steps[i]["learning_rate"] for i in (4, 5, 8)] == [3e-3, 1e-3, 5e-4]
    assert [steps[i]["consumed_tokens"] for i in (4, 7, 10)] == [1024, 1024 + 3 * 512, 1024 + 6 * 512]
    assert (tmp_path / "run" / "outcome.txt").read_text() == "finished at step 10\n"


def test_a_stage_added_behind_a_finished_run_gives_the_run_that_had_it_from_the_start(tmp_path: Path) -> None:
    write_shards(tmp_path)
    stages = [
        {"name": "short", "training": {"steps": 3}},
        {"name": "long", "training": {"steps": 3, "sequence_length": 128}},
    ]
    one_rank = SMALLEST | {"layout": {"tp": 1, "pp": 1, "ep": 1}}

    def run_file(name: str, number: int) -> Path:
        data = data_in(tmp_path)
        return write_run_file(tmp_path / name, data, steps=3, stages=stages[:number], **one_rank)

    assert lives.start(run_file("whole", 2)).wait(300) == 0
    assert lives.start(run_file("grown", 1)).wait(300) == 0
    assert (tmp_path / "grown" / "outcome.txt").read_text() == "finished at step 3\n"
    assert lives.start(run_file("grown", 2)).wait(300) == 0
    lives.assert_same_run(tmp_path / "grown", tmp_path / "whole", steps=6)


def _run_file(run_dir: Path, data) -> Path:
    path = write_run_file(run_dir, data, steps=4, model=SMALLEST["model"])
    path.write_text(path.read_text() + STAGES)
    return path
