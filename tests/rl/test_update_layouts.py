"""One update of the loop is the same on every layout: old log-probabilities, loss, gradients, ratio counts.

Groups of ragged answers go through the loop's own packing and step; the weights have moved since they were generated.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_m1.model.hybrid import build_model
from megatron_m1.rl.cispo import PolicyLossConfig
from megatron_m1.rl.learned import Learned
from megatron_m1.rl.sample import Group, Prompt, Sample, Score
from megatron_m1.rl.update import Policy
from megatron_m1.training.step import wrap_for_gradients
from parallel.groups import create_groups, destroy_groups
from parallel.layout import Layout
from tests import tolerances
from tests.equivalence.runner import MODEL, SEQUENCE, _pieces, assemble, relative_rms
from tests.spawn import run_ranks

pytestmark = pytest.mark.multiprocess

# no auxiliary loss: it depends on how many rows there are, and empty ones fill up to a multiple of dp
POLICY = dataclasses.replace(MODEL, auxiliary_coefficient=0.0)
LOSS = PolicyLossConfig(ratio_high=1.5, normalisation="combined")
ONE = Layout()
OF_FOUR = [
    Layout(tp=2, pp=2),
    Layout(dp=4),
    Layout(dp=2, ep=2, pp=2),
    Layout(tp=2, cp=2),
    Layout(cp=2, dp=2, ep=2),
    Layout(cp=4, cp_split="contiguous"),
]
LENGTHS = [(4, [7, 12, 3]), (9, [1, 20, 14]), (2, [31, 5, 8]), (13, [2, 2, 25])]


def groups_to_learn() -> list[Learned]:
    """Four groups of three samples; old log-probabilities lie on both sides of the policy's."""
    random = np.random.default_rng(3)
    found = []
    for number, (num_prompt, lengths) in enumerate(LENGTHS):
        prompt = Prompt(
            prompt_id=number, tokens_S=random.integers(0, POLICY.vocab_size, num_prompt), text="", task="none"
        )
        samples, old = [], []
        for index, length in enumerate(lengths):
            old_S = random.normal(-np.log(POLICY.vocab_size), 0.7, length).clip(max=0).astype(np.float32)
            samples.append(
                Sample(
                    prompt_id=number,
                    sample_id=index,
                    tokens_S=random.integers(0, POLICY.vocab_size, length),
                    # carried over: half of the tokens are of older weights
                    log_probs_S=(old_S - 0.3 * (np.arange(length) < length // 2)).astype(np.float32),
                    versions_S=np.arange(length, dtype=np.int32) // 8,
                    finish="stop",
                    text="",
                )
            )
            old.append(old_S)
        # the last reward of the last group failed: its sample takes no part
        scores = [Score(value=float(value)) for value in random.normal(size=3)]
        if number == 3:
            scores[-1] = Score(value=None, failure="timeout")
        found.append(Learned(Group(prompt=prompt, samples=tuple(samples), scores=tuple(scores)), tuple(old)))
    return found


def updates(layouts: list[Layout]) -> list[dict[str, Any]]:
    """On one rank: what the update gives under every layout, all of this world size."""
    return [_update(layout) for layout in layouts]


def _update(layout: Layout) -> dict[str, Any]:
    groups = create_groups(layout, torch.device("cpu"))
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    chunks = build_model(POLICY, groups, seed=7)
    wrapped = wrap_for_gradients(chunks, groups)
    policy = Policy(wrapped=wrapped, groups=groups, row_tokens=SEQUENCE, micro_batch=1)
    learned = groups_to_learn()
    asked = [(one.group.prompt, sample) for one in learned for sample in one.group.samples]
    log_probs = policy.log_probs(asked)
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    result, stats = policy.gradients(learned, LOSS, correction_at_most=2.0, reduce_everywhere=True)
    found = {
        "log_probs": np.concatenate(log_probs),
        "loss": result.loss_nats,
        "stats": stats.sums_N.numpy(),
        "gradients": _pieces(chunks, lambda parameter: parameter.main_grad),
    }
    destroy_groups()
    return found


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return run_ranks(1, updates, [ONE])[0][0]


def test_an_update_clips_and_every_weight_learns(one: dict[str, Any]) -> None:
    names = "tokens", "below", "above"
    counts = dict(zip(names, one["stats"], strict=False))
    assert counts["tokens"] == sum(sum(lengths) for _, lengths in LENGTHS) - 25
    assert counts["above"] > 0.1 * counts["tokens"]
    expected = assemble([one["gradients"]], tolerance=0.0)
    assert all(np.abs(values).max() > 0 for key, values in expected.items() if "experts" not in key)


def test_an_update_is_the_same_on_every_layout(one: dict[str, Any]) -> None:
    expected = assemble([one["gradients"]], tolerance=0.0)
    by_rank = run_ranks(4, updates, OF_FOUR)
    for index, layout in enumerate(OF_FOUR):
        ranks = [rank[index] for rank in by_rank]
        for rank in ranks:
            np.testing.assert_allclose(
                rank["log_probs"], one["log_probs"], atol=tolerances.GENERATED_LOG_PROB, err_msg=str(layout)
            )
            np.testing.assert_allclose(rank["loss"], one["loss"], rtol=tolerances.LOSS, err_msg=str(layout))
            # counts exactly, the two sums of nats to rounding
            np.testing.assert_allclose(rank["stats"][:6], one["stats"][:6], err_msg=str(layout))
            np.testing.assert_allclose(rank["stats"][6:8], one["stats"][6:8], rtol=1e-4, err_msg=str(layout))
        actual = assemble([rank["gradients"] for rank in ranks], tolerance=tolerances.GRADIENT_RMS)
        errors = {key: relative_rms(actual[key], expected[key]) for key in expected}
        wrong = {key: error for key, error in errors.items() if error > tolerances.GRADIENT_RMS}
        assert not wrong, (layout, wrong)
