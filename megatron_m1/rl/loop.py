"""The loop of reinforcement learning: a batch of groups, updates from it, metrics; again.

It stands where `training.loop.Trainer` stands in pretraining, between the same optimizer, schedule, checkpoints and
reporter. A step is an optimizer step; the queue says which batch it belongs to and what is left of it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_m1.model.flops import flops_per_token, peak_flops_per_s
from megatron_m1.model.hybrid import HybridModel
from megatron_m1.rl import batch_metrics
from megatron_m1.rl.collapse import signs_of, tightened, watch
from megatron_m1.rl.config import RLConfig
from megatron_m1.rl.learned import Learned
from megatron_m1.rl.queue import Queue
from megatron_m1.rl.ratio_stats import RatioStats
from megatron_m1.rl.rollout import Rollouts, Seen
from megatron_m1.rl.update import Policy
from megatron_m1.rl.window import generation_statistics, observe, window_tokens
from megatron_m1.training.config import TrainingConfig
from megatron_m1.training.loop import Reporter
from megatron_m1.training.metrics import StepMetrics, throughput
from megatron_m1.training.optimizer import Optimizer
from megatron_m1.training.position import Position
from megatron_m1.training.schedule import ScheduleConfig, learning_rate
from parallel.groups import Groups


@dataclass(slots=True)
class PolicyTrainer:
    """One rank's share of a stage of reinforcement learning."""

    config: RLConfig
    training: TrainingConfig
    schedule: ScheduleConfig
    grad_clip: float
    """optimizer.grad_clip, before collapse tightens it."""
    groups: Groups
    chunks: list[HybridModel]
    optimizer: Optimizer
    policy: Policy
    queue: Queue
    rollouts: Rollouts
    reporter: Reporter
    after_step: Callable[[Position], str | None]
    """Called after every step, on every rank: checkpoints. A reason ends the run here; all ranks give the same."""
    position: Position
    first: Position = field(default_factory=Position)
    """Where this stage of the run begins: the schedule counts from here."""
    accepts: Callable[[int, float, float, int, int], bool] = lambda *_numbers: True
    """Whether a step may change the weights; see `training.loop.Trainer`."""
    write_table: Callable[[int, Seen], None] = lambda *_seen: None
    """Takes the step and what a batch's rounds showed, every `config.table_every_batches` batches."""
    ended_early: str | None = None
    """Why the run ended before its last step; None while it has not."""

    @property
    def wrapped(self) -> list[Any]:
        """This rank's chunks inside megatron-core's DistributedDataParallel."""
        return list(self.policy.wrapped)

    def run(self) -> None:
        """Train to the end of the stage, or to an early end."""
        while self.position.step < self.first.step + self.training.steps and self.ended_early is None:
            started = time.perf_counter()
            if not self.queue.updates_left:
                self._next_batch()
            self._step(started)
            self.ended_early = self.after_step(self.position)

    def _next_batch(self) -> None:
        queue, config = self.queue, self.config
        seen = self.rollouts.next_batch(self.position.step)
        queue.batch_metrics = batch_metrics.of_rounds(seen, queue, config)
        queue.batch_metrics["window_tokens"] = window_tokens(config.window, queue.window)
        queue.batch_metrics["collapse_level"] = queue.collapse.level
        queue.batch_metrics["length_alarms"] = queue.length_watch.num_alarms
        if config.table_every_batches and (queue.num_batches - 1) % config.table_every_batches == 0:
            self.write_table(self.position.step, seen)
        samples = [sample for learned in queue.batch for sample in learned.group.samples]
        if not samples:
            return
        advantages = [float(value) for learned in queue.batch for value in learned.advantages_G]
        queue.collapse = watch(
            config.collapse, queue.collapse, signs_of(config.collapse, samples, advantages)
        )
        perplexity, _ = generation_statistics(samples)
        queue.window = observe(
            config.window,
            queue.window,
            perplexity=perplexity,
            length_p99=batch_metrics.whole_length_p99(queue.batch),
        )

    def _step(self, started: float) -> None:
        queue, place = self.queue, self.position
        rate = learning_rate(self.schedule, place.step - self.first.step, queue.trained_tokens)
        if queue.updates_left:
            # groups that do not divide evenly make updates that differ by one
            count = -(-len(queue.batch) // queue.updates_left)
            learned, queue.batch = queue.batch[:count], queue.batch[count:]
            queue.updates_left -= 1
        else:
            learned = []
        metrics = self._update(learned, rate) if learned else self._no_update(rate)
        self.position = Position(place.step + 1, place.consumed_samples, place.consumed_tokens)
        self.rollouts.learnt_from(learned)
        queue.trained_tokens += sum(one.num_tokens for one in learned)
        self._report(learned, rate, metrics, time.perf_counter() - started)

    def _update(self, learned: Sequence[Learned], rate: float) -> dict[str, Any]:
        loss, grad_clip = tightened(
            self.config.collapse, self.queue.collapse, self.config.loss, self.grad_clip
        )
        self.optimizer.set_grad_clip(grad_clip)
        for chunk in self.policy.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        result, stats = self.policy.gradients(
            learned, loss, correction_at_most=self.config.rollout.correction_at_most
        )
        was_made = True

        def accepts(norm: float) -> bool:
            nonlocal was_made
            ids = [one.group.prompt.prompt_id for one in learned]
            was_made = self.accepts(self.position.step + 1, result.loss_nats, norm, min(ids), len(ids))
            return was_made

        grad_norm = self.optimizer.step(rate, accepts)
        return self._update_metrics(result.loss_nats, stats) | {
            "auxiliary_loss": result.auxiliary_loss,
            "grad_norm": grad_norm,
            **result.expert_load(self.groups.layout.ep),
            "update_refused": int(not was_made),
            "update_skipped": 0,
        }

    @staticmethod
    def _update_metrics(policy_loss: float, stats: RatioStats) -> dict[str, Any]:
        found = stats.metrics()
        return found | {"loss_nats": found["mean_nats_per_token"], "policy_loss": policy_loss}

    def _no_update(self, rate: float) -> dict[str, Any]:
        """A batch without a group that teaches anything: the step counts, and nothing changes."""
        return {"loss_nats": 0.0, "policy_loss": 0.0, "update_refused": 0, "update_skipped": 1}

    def _report(self, learned: Sequence[Learned], rate: float, found: dict[str, Any], seconds: float) -> None:
        place, model = self.position, self.chunks[0].model
        peak = peak_flops_per_s(self.groups.device, self.training.precision)
        rates = throughput(
            num_tokens=sum(one.num_tokens for one in learned),
            step_time_s=seconds,
            flops_per_token=flops_per_token(model, self.policy.row_tokens),
            num_devices=self.groups.layout.world_size,
            peak_tflops_per_s_per_device=peak / 1e12 if peak else None,
        )
        ids = [one.group.prompt.prompt_id for one in learned]
        named = {name: found.pop(name, None) for name in ("loss_nats", "auxiliary_loss", "grad_norm")}
        self.reporter.step(
            StepMetrics(
                step=place.step,
                learning_rate=rate,
                consumed_samples=place.consumed_samples,
                consumed_tokens=place.consumed_tokens,
                step_time_s=seconds,
                sample_ids_hash=hashlib.sha256(str(ids).encode()).hexdigest()[:16],
                extra={
                    **self.queue.batch_metrics,
                    **found,
                    "prompts": " ".join(map(str, ids)),
                    "trained_tokens": self.queue.trained_tokens,
                },
                **named,
                **rates,
            )
        )
