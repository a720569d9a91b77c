"""A run that ends in reinforcement learning, killed at random, is the uninterrupted run; every prompt is used once."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from megatron_m1.training.spool import read_steps
from parallel.manifest import read_manifest
from tests.rl.tiny_rl import write_run_file, write_tokenizer
from tests.training import lives

pytestmark = pytest.mark.multiprocess

WARM, STEPS = 2, 8
METRICS = (
    "prompts",
    "reward",
    "pass_rate",
    "mismatch_correlation",
    "ratio_p99",
    "entropy_nats",
    "trained_tokens",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of a run that nobody disturbed; the tokenizer lies beside it."""
    directory = tmp_path_factory.mktemp("rl")
    write_tokenizer(directory / "tokenizer.json")
    run_file = write_run_file(
        directory / "whole", directory / "tokenizer.json", warm_steps=WARM, rl_steps=STEPS - WARM
    )
    assert lives.start(run_file).wait(300) == 0
    return directory / "whole"


def test_a_run_killed_in_its_rl_stage_equals_the_uninterrupted_one(whole: Path, tmp_path: Path) -> None:
    _kill_and_compare(whole, tmp_path / "killed", kills=2)


@pytest.mark.slow
def test_a_run_killed_ten_times_equals_the_uninterrupted_one(whole: Path, tmp_path: Path) -> None:
    _kill_and_compare(whole, tmp_path / "killed", kills=10)


def _kill_and_compare(whole: Path, killed: Path, *, kills: int) -> None:
    run_file = write_run_file(
        killed, whole.with_name("tokenizer.json"), warm_steps=WARM, rl_steps=STEPS - WARM
    )
    moments = random.Random(os.getpid())
    for _ in range(kills):
        process = lives.start(run_file)
        # a batch, an update of it, or the save between them, of whatever step this life gets to
        seen = read_steps(killed / "metrics.jsonl") if (killed / "metrics.jsonl").exists() else {}
        lives.wait_for_step(killed, process, min(STEPS - 1, max([*seen, 0]) + 1))
        lives.kill(process, after_s=moments.uniform(0.0, 0.6))
    assert lives.start(run_file).wait(300) == 0
    lives.assert_same_run(killed, whole, steps=STEPS)
    ours, theirs = read_steps(killed / "metrics.jsonl"), read_steps(whole / "metrics.jsonl")
    for step in range(WARM + 1, STEPS + 1):
        assert {name: ours[step][name] for name in METRICS} == {name: theirs[step][name] for name in METRICS}
    learnt = [prompt for step in range(WARM + 1, STEPS + 1) for prompt in ours[step]["prompts"].split()]
    assert len(set(learnt)) == len(learnt) > 0
    queues = [
        read_manifest(path / "checkpoints" / f"step_{STEPS:08d}").extra["rl"] for path in (killed, whole)
    ]
    assert queues[0] == queues[1]
    in_flight = sum(len(queues[0][part]) for part in ("running", "unscored", "ready", "batch"))
    assert sum(queues[0]["taken"].values()) == sum(queues[0]["fates"].values()) + in_flight
