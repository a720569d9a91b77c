"""Gradients that really explode behind a length jump: the run goes back, takes a stage between, and ends; killed in
the middle of that stage, and between the note and the undoing, it stays the same run, bit for bit."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_m1.insertion import read_answers, write_answers
from megatron_m1.training.spool import read_steps
from parallel.manifest import read_manifest
from tests.training import lives
from tests.training.tiny_run import data_in, write_run_file, write_shards

pytestmark = pytest.mark.multiprocess

# a learning rate of 1 without a clip is the explosion; the answer's factor is what makes the run go on
STAGES = """
length_jump: {patience_steps: 2, window_steps: 8, rate_factor: 0.002, token_share: 0.4}
stages:
  - {name: short, training: {steps: 9}}
  - name: long
    LAYOUT
    optimizer: {grad_clip: 0.0}
    training: {steps: 6, sequence_length: 256}
    checkpoint: {every_steps: 1, keep: 1}
    schedule: {peak_learning_rate: 1.0, batch_ramp: [{from_tokens: 0, global_batch_tokens: 512}]}
"""
# short 9, between 3 (0.4 of 6 steps, rounded up), long 6
STEPS = 18


ONE_RANK = ("layout: {tp: 1, ep: 1}", "layout: {}")
TWO_RANKS = ("layout: {tp: 2, ep: 2}", "layout: {tp: 1, cp: 2}")


@pytest.mark.parametrize(
    "layouts",
    [ONE_RANK, pytest.param(TWO_RANKS, marks=pytest.mark.slow)],
    ids=["one rank", "tp 2, then cp 2"],
)
def test_an_explosion_ends_in_an_inserted_stage_and_kills_change_nothing(
    layouts: tuple[str, str], tmp_path: Path
) -> None:
    write_shards(tmp_path)
    whole, killed = (_run_file(tmp_path / name, tmp_path, layouts) for name in ("whole", "killed"))
    assert lives.start(whole).wait(300) == 0
    (answer,) = read_answers(tmp_path / "whole")
    assert (answer.stage, answer.back_to, answer.is_done) == ("long", 9, True)
    assert answer.inserted is not None and answer.inserted["training"] == {"sequence_length": 128, "steps": 3}
    assert answer.step in (11, 12) and max(answer.growth.values()) > 100
    assert {"lightning 0", "router 3", "experts 5", "softmax 7", "embedding"} <= answer.growth.keys()
    steps = read_steps(tmp_path / "whole" / "metrics.jsonl")
    assert [steps[i]["learning_rate"] for i in (9, 10, 13)] == [3e-3, 2e-3, 2e-3]
    assert [steps[i]["consumed_tokens"] - steps[i - 1]["consumed_tokens"] for i in (11, 14)] == [512, 512]
    assert max(steps[i]["grad_norm"] for i in range(10, STEPS + 1)) < 5
    # the run file in a checkpoint has the stage among the others
    extra = read_manifest(tmp_path / "whole" / "checkpoints" / f"step_{STEPS:08d}").extra
    assert "128 before long" in extra["run_file"]

    process = lives.start(killed)
    _wait_for_inserted_step(tmp_path / "killed" / "metrics.jsonl", process)
    lives.kill(process)
    # from a checkpoint of the inserted stage, where there is one already
    assert lives.start(killed).wait(300) == 0
    lives.assert_same_run(tmp_path / "killed", tmp_path / "whole", steps=STEPS)
    if layouts == TWO_RANKS:
        # as if a life had been killed before anything was undone
        write_answers(tmp_path / "killed", [replace(answer, is_done=False)])
        assert lives.start(killed).wait(300) == 0
        lives.assert_same_run(tmp_path / "killed", tmp_path / "whole", steps=STEPS)


def _run_file(run_dir: Path, data: Path, layouts: tuple[str, str]) -> Path:
    """Layouts: of the run, and of its second stage."""
    path = write_run_file(run_dir, data_in(data), steps=9)
    text = path.read_text().replace(TWO_RANKS[0], layouts[0])
    path.write_text(text + STAGES.replace("LAYOUT", layouts[1]))
    return path


def _wait_for_inserted_step(record: Path, process: lives.Ranks) -> None:
    """Until step 11 is on record at the rate of the inserted stage; it was taken before, in the one that exploded."""
    while not record.exists() or read_steps(record).get(11, {}).get("learning_rate") != 2e-3:
        assert process.poll() is None, "the run ended before its inserted stage"
        time.sleep(0.02)
