"""From a generated sample to its score: the task's verdict, the format reward and the over-long penalty added up.

    R = task verdict + format weight * [text has the form] + over-long penalty

Verdicts come from the pool, later; the other two are computed at once. A failed verdict makes a failed score: it takes
no part in its group, and a run in which too many fail is ended.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_m1.rl.rewards.answer import AnswerPlace
from megatron_m1.rl.rewards.form import has_form
from megatron_m1.rl.rewards.interface import Reward
from megatron_m1.rl.rewards.overlong import OverlongConfig, overlong_penalty
from megatron_m1.rl.rewards.pool import RewardPool, Verdict
from megatron_m1.rl.sample import Prompt, Sample, Score, count_failures


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringConfig:
    """What is added to the verdict of a task, and how many failures are borne."""

    format_weight: float = 0.1
    """Added where a text of a verified task has the form; 0 asks for none."""
    answer_place: AnswerPlace = "boxed"
    """Where the form wants the answer."""
    thinking_opened_by_prompt: bool = False
    """Prompts end inside the thinking block, so that texts begin there."""
    overlong: OverlongConfig = field(default_factory=OverlongConfig)
    most_failed_share: float = 0.5
    """A batch of which a larger share has no reward ends the run."""

    def __post_init__(self) -> None:
        if self.format_weight < 0 or not 0 <= self.most_failed_share <= 1:
            raise ValueError(
                f"rl.scoring has format_weight={self.format_weight}, "
                f"most_failed_share={self.most_failed_share}: allowed "
                "are a weight of 0 or more and a share in [0, 1]; most_failed_share=0 bears no failure"
            )


class Scorer:
    """Scores samples by the rewards of their tasks.

    Args:
        rewards: task name -> reward, those of the pool.
        pool: where they run.
        config: what is added.
    """

    def __init__(self, rewards: Mapping[str, Reward], pool: RewardPool, config: ScoringConfig) -> None:
        self._rewards, self._pool, self._config = rewards, pool, config

    def submit(
        self, prompt: Prompt, sample: Sample, *, window_tokens: int
    ) -> concurrent.futures.Future[Score]:
        """Score a finished sample later.

        window_tokens: the window that it was generated under; the over-long penalty is sized by it.
        """
        result: concurrent.futures.Future[Score] = concurrent.futures.Future()
        pending = self._pool.submit(prompt, sample.text)

        def finish(done: concurrent.futures.Future[Verdict]) -> None:
            if done.cancelled():
                result.cancel()
                result.set_running_or_notify_cancel()
                return
            try:
                result.set_result(self._score(prompt, sample, done.result(), window_tokens))
            except Exception as error:
                result.set_exception(error)

        pending.add_done_callback(finish)
        return result

    def check(self, scores: Sequence[Score]) -> dict[str, int]:
        """`check_failures` by this scorer's configuration."""
        return check_failures(scores, self._config)

    def _score(self, prompt: Prompt, sample: Sample, verdict: Verdict, window_tokens: int) -> Score:
        if verdict.value is None:
            return Score(value=None, failure=verdict.failure, note=verdict.note)
        config = self._config
        penalty = overlong_penalty(
            config.overlong, num_tokens=len(sample.tokens_S), window_tokens=window_tokens
        )
        parts = {"task": verdict.value, "overlong": penalty}
        if config.format_weight and self._rewards[prompt.task].verifies:
            formed = has_form(
                sample.text, config.answer_place, opened_by_prompt=config.thinking_opened_by_prompt
            )
            parts["format"] = config.format_weight * formed
        return Score(value=sum(parts.values()), task_value=verdict.value, parts=parts, note=verdict.note)


def check_failures(scores: Sequence[Score], config: ScoringConfig) -> dict[str, int]:
    """Failures of a batch by kind, for the step's metrics.

    Raises:
        RuntimeError: more failed than the configuration bears.
    """
    failures = count_failures(scores)
    num_failed = sum(failures.values())
    if num_failed > config.most_failed_share * len(scores):
        note = next(score.note for score in scores if score.failure is not None)
        raise RuntimeError(
            f"{num_failed} of {len(scores)} samples have no reward ({failures}), for example: {note}; "
            f"allowed is a share of {config.most_failed_share}: repair the reward or its judge and resume from the "
            "checkpoint, or raise rl.scoring.most_failed_share"
        )
    return failures
