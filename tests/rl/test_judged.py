"""Judged tasks in the loop: growth without gain calibrates the judge, and rewards change by what length explained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_m1.rl.judged import calibrated, watch
from megatron_m1.rl.rewards.length_watch import LengthWatchConfig, LengthWatchState
from megatron_m1.rl.sample import Group, Score
from tests.rl.make import make_prompt, make_sample

JUDGED = {"essay": (0.0, 1.0)}
CONFIG = LengthWatchConfig(steps=2)


def group(number: int, lengths: list[int], verdicts: list[float | None], task: str = "essay") -> Group:
    scores = [
        Score(value=None, failure="unavailable")
        if verdict is None
        else Score(value=verdict - 0.25, task_value=verdict, parts={"task": verdict, "overlong": -0.25})
        for verdict in verdicts
    ]
    samples = [make_sample(number, place, tokens=length) for place, length in enumerate(lengths)]
    prompt = replace(make_prompt(number), task=task)
    return Group(prompt=prompt, samples=tuple(samples), scores=tuple(scores))


def seen(scale: int) -> list[Group]:
    """A judge that gives 0.1 for every doubling of the length, and sums that half of the samples solve."""
    lengths = [scale, 2 * scale, 4 * scale]
    return [group(0, lengths, [0.4, 0.5, 0.6]), group(1, [3, 3], [1.0, 0.0], task="sums")]


def test_growth_without_gain_takes_the_judges_slope_off_its_rewards() -> None:
    state = LengthWatchState()
    for scale in (8, 8, 16, 16):
        assert state.slope == 0.0
        state = watch(CONFIG, state, seen(scale), JUDGED, solved_at=1.0)
    assert state.num_alarms == 1
    assert state.slope == pytest.approx(0.1 / np.log(2))
    essay, sums = (calibrated(one, JUDGED, state) for one in seen(16))
    # nothing is left but the mean verdict and the over-long penalty; the judge's own word stays
    assert essay.rewards_G == pytest.approx([0.25, 0.25, 0.25])
    assert [score.task_value for score in essay.scores] == [0.4, 0.5, 0.6]
    assert essay.scores[0].parts["length"] == pytest.approx(0.1)
    assert sums.rewards_G.tolist() == seen(16)[1].rewards_G.tolist()


def test_growth_with_gain_or_without_a_measure_raises_no_alarm() -> None:
    gaining, alone = LengthWatchState(), LengthWatchState()
    for scale, solved in ((8, 0.0), (8, 0.0), (16, 1.0), (16, 1.0)):
        essay = seen(scale)[0]
        sums = group(1, [3, 3], [1.0, solved], task="sums")
        gaining = watch(CONFIG, gaining, [essay, sums], JUDGED, solved_at=1.0)
        alone = watch(CONFIG, alone, [essay], JUDGED, solved_at=1.0)
    assert gaining.num_alarms == alone.num_alarms == 0 and alone.lengths == ()


def test_failed_verdicts_stay_failed() -> None:
    state = LengthWatchState(slope=0.1)
    found = calibrated(group(0, [4, 8, 16], [0.5, None, 0.5]), JUDGED, state)
    assert np.isnan(found.rewards_G[1]) and found.rewards_G[0] > 0.25 > found.rewards_G[2]
    assert calibrated(group(0, [4], [None]), JUDGED, state).scores[0].failure == "unavailable"
