"""Tasks that a judge scores, in the loop: what length explains is taken off its verdicts, and drift raises an alarm.

The watch itself is rewards/length_watch.py; it compares the length of judged answers with the pass rate of tasks that
rules verify, in which the judge has no part. Without verified tasks there is nothing to compare with, and no alarm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from megatron_m1.rl.rewards.length_watch import (
    LengthWatchConfig,
    LengthWatchState,
    observe,
    recalibrated,
    without_length,
)
from megatron_m1.rl.sample import Group

Ranges = Mapping[str, tuple[float, float]]
"""Judged task -> the least and the highest verdict."""


def calibrated(group: Group, judged: Ranges, state: LengthWatchState) -> Group:
    """The group with what length explains taken off its rewards; the judge's own verdicts stay beside them."""
    if group.prompt.task not in judged or not state.slope:
        return group
    scored = [place for place, score in enumerate(group.scores) if score.task_value is not None]
    low, high = judged[group.prompt.task]
    verdicts, lengths = _judged(group)
    if not len(verdicts):
        return group
    better = without_length(state, verdicts, lengths, low=low, high=high)
    scores = list(group.scores)
    for place, change in zip(scored, better - verdicts, strict=True):
        score = scores[place]
        assert score.value is not None, score
        scores[place] = replace(
            score, value=score.value + float(change), parts={**score.parts, "length": float(change)}
        )
    return replace(group, scores=tuple(scores))


def watch(
    config: LengthWatchConfig,
    state: LengthWatchState,
    groups: Sequence[Group],
    judged: Ranges,
    *,
    solved_at: float,
) -> LengthWatchState:
    """The state after one batch's groups; after an alarm with a slope fitted to them."""
    own = [_judged(group) for group in groups if group.prompt.task in judged]
    own = [(verdicts, lengths) for verdicts, lengths in own if len(verdicts)]
    verified = [
        score.task_value >= solved_at
        for group in groups
        if group.prompt.task not in judged
        for score in group.scores
        if score.task_value is not None
    ]
    if not own or not verified:
        return state
    mean_length = float(np.concatenate([lengths for _, lengths in own]).mean())
    seen, alarm = observe(config, state, mean_length=mean_length, task_value=float(np.mean(verified)))
    if not alarm:
        return seen
    return recalibrated(seen, [verdicts for verdicts, _ in own], [lengths for _, lengths in own])


def _judged(group: Group) -> tuple[np.ndarray, np.ndarray]:
    """The judge's own verdicts and the lengths in tokens of the samples that have one."""
    pairs = [
        (score.task_value, len(sample.tokens_S))
        for sample, score in zip(group.samples, group.scores, strict=True)
        if score.task_value is not None
    ]
    verdicts, lengths = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(verdicts, dtype=np.float64), np.array(lengths, dtype=np.float64)
