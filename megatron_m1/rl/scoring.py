"""Rewards for all ranks: rank 0 has the processes that compute them, the others are told.

Scores are asked for when a sample ends and taken when its group is complete, so that rewards are computed beside
whatever the trainer does meanwhile. A text that several samples of a group share is scored once.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch.distributed as dist

from megatron_m1.rl.queue import Unscored, dump_score
from megatron_m1.rl.rewards.interface import Reward, check_rewards
from megatron_m1.rl.rewards.pool import PoolConfig, RewardPool
from megatron_m1.rl.rewards.scorer import Scorer, ScoringConfig, check_failures
from megatron_m1.rl.sample import Prompt, Sample, Score


class Scoring:
    """Scores of complete groups; a context manager. Building it is collective.

    Args:
        rewards: task -> reward.
        pool: how many processes.
        config: what is added to a verdict.
        scores: those known, by `key_of`; kept up to date here.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        pool: PoolConfig,
        config: ScoringConfig,
        scores: dict[str, dict[str, Any]],
    ) -> None:
        self._rewards, self._config, self._scores = rewards, config, scores
        self._pool: RewardPool | None = None
        problem: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                check_rewards(rewards)
                self._pool = RewardPool(rewards, pool)
                self._scorer = Scorer(rewards, self._pool, config)
            except Exception as error:
                problem = ["; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])]
        dist.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            raise ValueError(
                f"a reward is not ready: {problem[0]}; every reward is proved before anything is generated: repair it, "
                "or remove its source from rl.sources"
            )
        self._asked: dict[str, concurrent.futures.Future[Score]] = {}

    @property
    def judged(self) -> dict[str, tuple[float, float]]:
        """Tasks that a judge scores, with the range of its verdicts."""
        return {task: reward.verdict_range for task, reward in self._rewards.items() if not reward.verifies}

    def submit(self, prompt: Prompt, sample: Sample, window: int) -> None:
        """Begin to score a finished sample; nothing on ranks other than 0.

        window: tokens of prompt and answer that it was generated under.
        """
        key = key_of(sample)
        if self._pool is not None and key not in self._scores and key not in self._asked:
            answer_window = window - len(prompt.tokens_S)
            self._asked[key] = self._scorer.submit(prompt, sample, window_tokens=answer_window)

    def scores_of(self, groups: Sequence[Unscored]) -> list[tuple[Score, ...]]:
        """Scores of groups whose samples were all submitted, on every rank; waits for them. Collective.

        Raises:
            RuntimeError: more rewards failed than the configuration bears.
        """
        wanted = {key_of(sample) for group in groups for sample in group.samples}
        found = self._scores | self._take(wanted & self._asked.keys())
        scores = [tuple(Score(**found[key_of(sample)]) for sample in group.samples) for group in groups]
        check_failures([score for group in scores for score in group], self._config)
        return scores

    def keep_done(self) -> None:
        """Put what has been scored meanwhile among the known scores, for a checkpoint. Collective.

        Failures are not kept: the next life asks again.
        """
        done = {key for key, future in self._asked.items() if future.done()}
        found = self._take(done, keep=True)
        self._scores |= {key: score for key, score in found.items() if score["failure"] is None}

    def _take(self, keys: set[str], *, keep: bool = False) -> dict[str, dict[str, Any]]:
        """Scores of these keys from rank 0, on every rank."""
        found: list[Any] = [None]
        if self._pool is not None:
            found = [{key: dump_score(self._asked[key].result()) for key in sorted(keys)}]
            for key in [] if keep else keys:
                del self._asked[key]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def forget(self, prompt: Prompt) -> None:
        """Drop the scores of a prompt that leaves the queue."""
        start = f"{prompt.prompt_id}/"
        for key in [key for key in self._scores if key.startswith(start)]:
            del self._scores[key]

    def __enter__(self) -> Scoring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.close()


def key_of(sample: Sample) -> str:
    """Prompt, length (of which the over-long penalty is made) and text of a sample."""
    text = hashlib.sha256(sample.text.encode()).hexdigest()[:32]
    return f"{sample.prompt_id}/{len(sample.tokens_S)}/{text}"
