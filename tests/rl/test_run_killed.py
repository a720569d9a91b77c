"""A whole life of a model, killed at random, is the uninterrupted one, and every prompt is used once.

Pretraining, two longer contexts, fine-tuning and reinforcement learning, under another layout in each.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from megatron_m1.training.spool import read_steps
from parallel.manifest import read_manifest
from tests.rl.tiny_rl import RL_FIRST, write_run_file, write_tokenizer
from tests.training import lives

pytestmark = pytest.mark.multiprocess

RL_STEPS = 8
STEPS = RL_FIRST + RL_STEPS
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
    run_file = write_run_file(directory / "whole", directory / "tokenizer.json", rl_steps=RL_STEPS)
    assert lives.start(run_file).wait(300) == 0
    return directory / "whole"


def test_a_life_killed_at_random_equals_the_uninterrupted_one(whole: Path, tmp_path: Path) -> None:
    _assert_equal_after_kills(whole, tmp_path / "killed", kills=2)


@pytest.mark.slow
def test_a_life_killed_ten_times_equals_the_uninterrupted_one(whole: Path, tmp_path: Path) -> None:
    _assert_equal_after_kills(whole, tmp_path / "killed", kills=10)


def _assert_equal_after_kills(whole: Path, killed: Path, *, kills: int) -> None:
    run_file = write_run_file(killed, whole.with_name("tokenizer.json"), rl_steps=RL_STEPS)
    moments = random.Random(os.getpid())
    for step in sorted(moments.randint(1, RL_FIRST + 1) for _ in range(kills - 1)):
        process = lives.start(run_file)
        lives.wait_for_step(killed, process, step)
        lives.kill(process, after_s=moments.uniform(0.0, 0.6))
    # the last one in reinforcement learning: in a rollout, an update, or the save between them, behind a save that the
    # last life can go on from, with a batch under way
    process = lives.start(run_file)
    lives.wait_for_checkpoint(killed, process, RL_FIRST + 1)
    lives.kill(process, after_s=moments.uniform(0.0, 0.3))
    assert lives.start(run_file).wait(300) == 0
    began_after, taken = lives.steps_by_life(killed)[-1]
    assert began_after > RL_FIRST and taken, (began_after, taken)
    lives.assert_same_run(killed, whole, steps=STEPS)
    ours, theirs = read_steps(killed / "metrics.jsonl"), read_steps(whole / "metrics.jsonl")
    for step in range(RL_FIRST + 1, STEPS + 1):
        # a step without an update has no ratios
        for name in METRICS:
            assert ours[step].get(name) == theirs[step].get(name), (step, name)
    learnt = [prompt for step in range(RL_FIRST + 1, STEPS + 1) for prompt in ours[step]["prompts"].split()]
    assert len(set(learnt)) == len(learnt) > 0
    queues = [
        read_manifest(path / "checkpoints" / f"step_{STEPS:08d}").extra["rl"] for path in (killed, whole)
    ]
    assert queues[0] == queues[1]
    in_flight = sum(len(queues[0][part]) for part in ("running", "unscored", "ready", "batch"))
    assert sum(queues[0]["taken"].values()) == sum(queues[0]["fates"].values()) + in_flight
