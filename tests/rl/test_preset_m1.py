"""MiniMax-M1's recipe as a preset: what the paper states stands in it, behind the stages of its length extension."""

from __future__ import annotations

from megatron_m1.config import check_rl, load_run
from megatron_m1.rl.rewards.interface import Reward
from megatron_m1.stages import stages_of

K = 1024


def test_the_extension_comes_first_and_every_stage_fills_the_same_ranks() -> None:
    *extension, sft, policy = stages_of(load_run("m1-456b-rl-m1"))
    expected = stages_of(load_run("m1-456b-extend-m1"))
    for ours, theirs in zip(extension, expected, strict=True):
        for part in ("training", "schedule", "layout", "model"):
            assert getattr(ours.config, part) == getattr(theirs.config, part), (ours.name, part)
        assert ours.data.stages[ours.index] == theirs.data.stages[theirs.index], ours.name
    assert {stage.config.layout.world_size for stage in (*extension, sft, policy)} == {1024}
    assert (sft.kind, policy.kind) == ("train", "rl")
    assert sft.data.stages[sft.index].weights == {"reasoning": 1.0}


def test_the_last_stage_is_the_papers() -> None:
    config = stages_of(load_run("m1-456b-rl-m1"))[-1].config
    check_rl(config, "CISPO")
    rl, optimizer = config.rl, config.optimizer
    # section 3.1: eq. 4-5 without a lower bound and without KL, 16 off-policy updates
    assert (rl.loss.algorithm, rl.loss.bounds[0], rl.loss.kl_coefficient) == ("cispo", 0.0, 0.0)
    assert (rl.loss.normalised_by, rl.updates_per_batch) == ("token", 16)
    # section 3.2
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.9, 0.95, 1e-15)
    assert (rl.repetition.tokens, rl.repetition.probability) == (3000, 0.99)
    # section 5
    assert rl.window.stages_tokens == tuple(k * K for k in (40, 48, 56, 64, 72, 80))
    assert config.training.sequence_length == 80 * K


def test_verified_tasks_come_first_and_judged_ones_are_mixed_in() -> None:
    rl = stages_of(load_run("m1-456b-rl-m1"))[-1].config.rl
    rewards: dict[str, Reward] = {source.name: source.build_reward() for source in rl.sources}
    judged = {name for name, reward in rewards.items() if not reward.verifies}
    assert rl.curriculum is not None and judged == {"truths", "open"}
    shares = [sum(rl.curriculum.weights(step)[name] for name in judged) for step in (0, 1000, 2000, 4000)]
    assert shares[:2] == [0.0, 0.0] and 0 < shares[2] < shares[3] < 0.5, shares
