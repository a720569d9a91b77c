"""The training loop: steps, evaluation, checkpoints and reports, on any layout.

The loop takes rows from whoever gives them (`RowSource`); it does not know files. Everything that decides what
happens in step n is a function of the run file and the `Position`, so a resumed run repeats the uninterrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_m1.model.flops import flops_per_token, peak_flops_per_s
from megatron_m1.model.hybrid import HybridModel
from megatron_m1.training.batch import Row, make_microbatch, sample_ids
from megatron_m1.training.config import TrainingConfig
from megatron_m1.training.metrics import StepMetrics, throughput
from megatron_m1.training.optimizer import Optimizer
from megatron_m1.training.position import Position
from megatron_m1.training.schedule import ScheduleConfig, global_batch_samples, learning_rate
from megatron_m1.training.step import StepResult, run_microbatches
from parallel.groups import Groups


class RowSource(Protocol):
    """Where rows come from: one iterator over steps per life, reading ahead as it likes."""

    def steps(self, plan: Iterator[Sequence[int]]) -> Iterator[Sequence[Row]]:
        """The rows of each step of `plan`, in its order."""

    def held_out(self, ids: Sequence[int]) -> Sequence[Row]:
        """Held-out rows by number."""

    def name_of(self, ids: Sequence[int]) -> str:
        """A short hash of the samples of one step, independent of their order."""


class Reporter(Protocol):
    """What is told of progress. Only rank 0's does anything."""

    def step(self, metrics: StepMetrics) -> None: ...
    def evaluation(self, step: int, values: dict[str, float]) -> None: ...


@dataclass(slots=True)
class Trainer:
    """One rank's share of a run."""

    config: TrainingConfig
    schedule: ScheduleConfig
    groups: Groups
    chunks: list[HybridModel]
    wrapped: list[Any]
    """The chunks inside megatron-core's DistributedDataParallel."""
    optimizer: Optimizer
    rows: RowSource
    reporter: Reporter
    after_step: Callable[[Position], str | None]
    """Called after every step, on every rank: checkpoints. A reason ends the run here; all ranks give the same."""
    position: Position
    first: Position = field(default_factory=Position)
    """Where this stage of the run begins: schedule and batch ramp count from here."""
    accepts: Callable[[int, float, float, int, int], bool] = lambda *_numbers: True
    """Whether a step may change the weights, by its number, loss, gradient norm, first sample and count of samples; all
    ranks answer the same."""
    ended_early: str | None = None
    """Why the run ended before its last step; None while it has not."""

    @property
    def last_step(self) -> int:
        """The step at which the stage ends."""
        return self.first.step + self.config.steps

    def run(self) -> float | None:
        """Train to the end of the stage, or to an early end; the last held-out loss in nats, None when nothing is
        evaluated."""
        held_out = None
        for rows in self.rows.steps(self._plan()):
            self._train_step(rows)
            step = self.position.step
            every = self.config.evaluate_every_steps
            if step == self.last_step or (every and step % every == 0):
                held_out = self.evaluate()
            self.ended_early = self.after_step(self.position)
            if self.ended_early is not None:
                break
        return held_out

    def _plan(self) -> Iterator[list[int]]:
        """Sample numbers of this data-parallel rank, step by step, to the end of the stage."""
        step, consumed = self.position.step, self.position.consumed_samples
        tokens = self.position.consumed_tokens
        while step < self.last_step:
            count = self._global_rows(tokens)
            yield [i for ids in self._ids(consumed, count) for i in ids]
            step, consumed, tokens = step + 1, consumed + count, tokens + count * self.config.sequence_length

    def _global_rows(self, consumed_tokens: int) -> int:
        per_pass = self.config.micro_batch_size * self.groups.layout.dp
        tokens = consumed_tokens - self.first.consumed_tokens
        return global_batch_samples(self.schedule, tokens, self.config.sequence_length, per_pass)

    def _ids(self, consumed: int, count: int) -> list[list[int]]:
        return sample_ids(
            consumed=consumed,
            global_rows=count,
            micro_batch=self.config.micro_batch_size,
            data_parallel=self.groups.layout.dp,
            data_rank=self.groups.coordinates["dp"],
        )

    def _train_step(self, rows: Sequence[Row]) -> None:
        started = time.perf_counter()
        place = self.position
        count = self._global_rows(place.consumed_tokens)
        step, tokens = place.step - self.first.step, place.consumed_tokens - self.first.consumed_tokens
        rate = learning_rate(self.schedule, step, tokens)
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        result = run_microbatches(self.wrapped, self._microbatches(rows, count), self.groups)
        was_made = True

        def accepts(norm: float) -> bool:
            nonlocal was_made
            was_made = self.accepts(place.step + 1, result.loss_nats, norm, place.consumed_samples, count)
            return was_made

        grad_norm = self.optimizer.step(rate, accepts)
        self.position = Position(
            place.step + 1,
            place.consumed_samples + count,
            place.consumed_tokens + count * self.config.sequence_length,
        )
        names = self.rows.name_of(self._all_ids(rows))
        self.reporter.step(
            self._metrics(
                result, rate, grad_norm, names, count, time.perf_counter() - started, was_made=was_made
            )
        )

    def _microbatches(self, rows: Sequence[Row], global_rows: int) -> list:
        size = self.config.micro_batch_size
        return [
            make_microbatch(
                rows[start : start + size],
                global_rows=global_rows,
                device=self.groups.device,
                piece=self.groups.piece,
            )
            for start in range(0, len(rows), size)
        ]

    def _all_ids(self, rows: Sequence[Row]) -> list[int]:
        """The samples every data-parallel rank really read in this step."""
        own = torch.tensor([row.sample_id for row in rows], dtype=torch.int64, device=self.groups.device)
        everyone = [torch.empty_like(own) for _ in range(self.groups.layout.dp)]
        dist.all_gather(everyone, own, group=self.groups.collection.dp)
        return torch.cat(everyone).tolist()

    def _metrics(
        self,
        result: StepResult,
        rate: float,
        grad_norm: float,
        names: str,
        count: int,
        seconds: float,
        *,
        was_made: bool,
    ) -> StepMetrics:
        config, place = self.config, self.position
        model = self.chunks[0].model
        peak = peak_flops_per_s(self.groups.device, config.precision)
        rates = throughput(
            num_tokens=count * config.sequence_length,
            step_time_s=seconds,
            flops_per_token=flops_per_token(model, config.sequence_length),
            num_devices=self.groups.layout.world_size,
            peak_tflops_per_s_per_device=peak / 1e12 if peak else None,
        )
        return StepMetrics(
            step=place.step,
            loss_nats=result.loss_nats,
            learning_rate=rate,
            consumed_samples=place.consumed_samples,
            consumed_tokens=place.consumed_tokens,
            step_time_s=seconds,
            auxiliary_loss=result.auxiliary_loss,
            grad_norm=grad_norm,
            sample_ids_hash=names,
            extra={
                "loss_tokens": result.loss_tokens,
                **result.expert_load(self.groups.layout.ep),
                "update_refused": int(not was_made),
            },
            **rates,
        )

    def evaluate(self) -> float | None:
        """Mean loss in nats per token over the held-out rows; the same rows every time."""
        count = self.config.evaluation_rows
        if count == 0:
            return None
        ids = [i for microbatch in self._ids(0, count) for i in microbatch]
        microbatches = self._microbatches(self.rows.held_out(ids), count)
        with torch.no_grad():
            result = run_microbatches(self.wrapped, microbatches, self.groups, forward_only=True)
        self.reporter.evaluation(self.position.step, {"held_out_loss_nats": result.loss_nats})
        return result.loss_nats
