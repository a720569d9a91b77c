"""From prompts to batches of groups to learn from: rounds of generation, scores, dynamic sampling, bounded staleness.

A round starts as many prompts as are wanted, generates (finished samples, or cut ones that the next round carries on),
takes the trainer's own log-probabilities of the groups that are complete, and has them scored. Everything that decides
what a round does is in the queue, so a resumed run repeats it. Every prompt that is taken meets one fate, and is
counted: learnt from, dropped (all solved, none solved, all equal, unscored), or dropped as stale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from megatron_m1.rl.advantage import drop_equal_groups, prompts_to_refill
from megatron_m1.rl.config import RLConfig
from megatron_m1.rl.curriculum import CurriculumConfig, CurriculumPoint, next_task
from megatron_m1.rl.generate import Request
from megatron_m1.rl.judged import calibrated, watch
from megatron_m1.rl.learned import Learned
from megatron_m1.rl.mismatch import Mismatch, check, measure
from megatron_m1.rl.prompts import PromptBook
from megatron_m1.rl.queue import Queue, Started, Unscored
from megatron_m1.rl.sample import Group, Prompt, Sample
from megatron_m1.rl.scoring import Scoring
from megatron_m1.rl.window import window_tokens

_SHARE_MEMORY = 0.5


class Engine(Protocol):
    """Whatever generates: the trainer's own model, or a server that has its weights."""

    def generate(
        self, requests: Sequence[Request], *, window: int, version: int, max_passes: int | None
    ) -> list[Sample]:
        """Samples of these requests, by the weights of step `version`; the same on every rank. Collective."""

    def metrics(self) -> dict[str, float]:
        """What the engine has to report of itself; the same on every rank. Collective."""


LogProbsOf = Callable[[Sequence[tuple[Prompt, Sample]]], list[np.ndarray]]


@dataclass(slots=True)
class Seen:
    """What the rounds of one `next_batch` showed, for its metrics."""

    rounds: int = 0
    groups: list[Group] = field(default_factory=list)
    """All that were scored, also those that were dropped."""
    trained: list[np.ndarray] = field(default_factory=list)
    """The trainer's log-probabilities of tokens that the present weights generated."""
    generated: list[np.ndarray] = field(default_factory=list)
    """The engine's, of the same tokens."""
    restarted: int = 0
    """Cut samples that had become stale and were generated anew."""
    carried: int = 0
    """Cut samples that were carried on."""
    engine: dict[str, float] = field(default_factory=dict)
    """What the engine reports of itself."""

    def mismatch(self) -> Mismatch:
        """Between the two, over all tokens."""
        empty = np.zeros(0, np.float32)
        return measure(np.concatenate([empty, *self.trained]), np.concatenate([empty, *self.generated]))


class Rollouts:
    """Fills the queue. Every method is collective.

    Args:
        config: section `rl`.
        book: all prompts.
        queue: where things are; changed in place.
        engine: generates.
        scoring: rewards.
        log_probs: of samples, by the trainer under its present weights.
    """

    def __init__(
        self,
        config: RLConfig,
        book: PromptBook,
        queue: Queue,
        engine: Engine,
        scoring: Scoring,
        log_probs: LogProbsOf,
    ) -> None:
        self._config, self._book, self._queue = config, book, queue
        self._engine, self._scoring, self._log_probs = engine, scoring, log_probs
        self._curriculum = config.curriculum or CurriculumConfig(
            points=(CurriculumPoint(weights={task: float(size) for task, size in book.sizes.items()}),)
        )
        # a life may have ended while rewards were computed
        for started in [*queue.running, *(one.started for one in queue.unscored)]:
            for sample in started.samples.values():
                self._submit(started, sample)

    def next_batch(self, version: int) -> Seen:
        """Put the next batch into `queue.batch`, and with a lag begin the one after it.

        version: optimizer step of the present weights.

        Raises:
            MismatchError: generation and training disagree.
            RuntimeError: too many rewards failed.
        """
        queue, config = self._queue, self._config
        seen = Seen()
        self._score(seen)
        while len(queue.ready) < config.groups_per_batch and seen.rounds < config.most_rounds:
            self._round(seen, version, used_at=version)
            self._score(seen)
        queue.length_watch = watch(
            config.length_watch,
            queue.length_watch,
            seen.groups,
            self._scoring.judged,
            solved_at=config.solved_at,
        )
        self._take(version)
        if config.rollout.lag_batches:
            self._round(seen, version, used_at=version + config.updates_per_batch)
        check(seen.mismatch(), config.mismatch)
        seen.engine = self._engine.metrics()
        return seen

    def learnt_from(self, groups: Sequence[Learned]) -> None:
        """These groups of the batch have been used."""
        for learned in groups:
            self._leave(learned.group.prompt, "learnt")

    def _take(self, version: int) -> None:
        """The oldest groups that are not too old become the batch."""
        queue, config = self._queue, self._config
        limit = config.rollout.max_staleness_batches * config.updates_per_batch
        fresh = [learned for learned in queue.ready if version - learned.oldest_version <= limit]
        for learned in queue.ready:
            if version - learned.oldest_version > limit:
                self._leave(learned.group.prompt, "stale")
        queue.batch, queue.ready = fresh[: config.groups_per_batch], fresh[config.groups_per_batch :]
        queue.num_batches += 1
        queue.updates_left = min(config.updates_per_batch, len(queue.batch))

    def _round(self, seen: Seen, version: int, *, used_at: int) -> None:
        """Generate: what was cut, and as many new prompts as are missing.

        used_at: version of the weights when the first update uses what this round finishes.
        """
        queue, config = self._queue, self._config
        seen.rounds += 1
        self._drop_stale_samples(seen, used_at)
        under_way = (len(queue.running) + len(queue.unscored)) * queue.kept_share
        wanted = prompts_to_refill(
            wanted=config.groups_per_batch,
            kept=len(queue.ready) + under_way,
            kept_share=queue.kept_share,
            at_most=2 * config.groups_per_batch - len(queue.running),
        )
        for _ in range(wanted):
            task, queue.credits = next_task(self._curriculum, queue.credits, version)
            queue.running.append(Started(self._book.take(task)))
        window = window_tokens(config.window, queue.window)
        self._generate(window, version)
        complete = [started for started in queue.running if started.is_complete(config.group_size)]
        queue.running = [started for started in queue.running if not started.is_complete(config.group_size)]
        seen.carried += sum(sample.finish is None for one in queue.running for sample in one.samples.values())
        self._add_log_probs(seen, complete, version)

    def _drop_stale_samples(self, seen: Seen, used_at: int) -> None:
        limit = self._config.rollout.max_staleness_batches * self._config.updates_per_batch
        for started in self._queue.running:
            stale = [n for n, sample in started.samples.items() if used_at - sample.oldest_version > limit]
            for number in stale:
                del started.samples[number]
            seen.restarted += len(stale)

    def _generate(self, window: int, version: int) -> None:
        by_id = {started.prompt.prompt_id: started for started in self._queue.running}
        requests = [
            Request(prompt=started.prompt, sample_id=number, earlier=started.samples.get(number))
            for started in self._queue.running
            for number in range(self._config.group_size)
            if getattr(started.samples.get(number), "finish", None) is None
        ]
        passes = self._config.rollout.passes_per_round or None
        samples = self._engine.generate(requests, window=window, version=version, max_passes=passes)
        for sample in samples:
            started = by_id[sample.prompt_id]
            started.samples[sample.sample_id] = sample
            started.window = window
            self._submit(started, sample)

    def _submit(self, started: Started, sample: Sample) -> None:
        if sample.finish is not None:
            self._scoring.submit(started.prompt, sample, started.window)

    def _add_log_probs(self, seen: Seen, complete: Sequence[Started], version: int) -> None:
        asked = [
            (started.prompt, started.samples[number])
            for started in complete
            for number in range(self._config.group_size)
        ]
        found = self._log_probs(asked)
        for (_, sample), trained_S in zip(asked, found, strict=True):
            is_present_S = sample.versions_S == version
            seen.trained.append(trained_S[is_present_S])
            seen.generated.append(sample.log_probs_S[is_present_S])
        size = self._config.group_size
        self._queue.unscored += [
            Unscored(started, tuple(found[size * index : size * (index + 1)]))
            for index, started in enumerate(complete)
        ]

    def _score(self, seen: Seen) -> None:
        """Wait for the scores of complete groups, and keep those that teach something."""
        queue, config = self._queue, self._config
        if not queue.unscored:
            return
        scores = self._scoring.scores_of(queue.unscored)
        groups = [
            calibrated(
                Group(prompt=one.started.prompt, samples=one.samples, scores=own),
                self._scoring.judged,
                queue.length_watch,
            )
            for one, own in zip(queue.unscored, scores, strict=True)
        ]
        seen.groups += groups
        filtered = drop_equal_groups(groups, solved_at=config.solved_at)
        kept = {group.prompt.prompt_id for group in filtered.kept}
        for one, group in zip(queue.unscored, groups, strict=True):
            if group.prompt.prompt_id in kept:
                queue.ready.append(Learned(group, one.old_log_probs))
            self._scoring.forget(group.prompt)
        for fate in ("all_solved", "none_solved", "all_equal", "unscored"):
            queue.fates.add(fate, getattr(filtered, f"num_{fate}"))
        queue.unscored = []
        queue.kept_share += _SHARE_MEMORY * (filtered.kept_share - queue.kept_share)

    def _leave(self, prompt: Prompt, fate: str) -> None:
        self._queue.fates.add(fate)
        taken = sum(self._book.taken.values())
        # the batch still holds the groups of an update that is being made
        assert self._queue.fates.total <= taken, (prompt.prompt_id, self._queue.fates.counts, taken)
