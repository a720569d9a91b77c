"""One update of a policy, and the log-probabilities of its samples: through the same step as pretraining.

The loss is `cispo.py`, the path (pipeline, tensor, expert, data and context parallelism) is training/step.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_m1.rl.cispo import PolicyLossConfig, policy_loss
from megatron_m1.rl.learned import Learned, answers_of
from megatron_m1.rl.ratio_stats import RatioStats
from megatron_m1.rl.rows import (
    LogProbs,
    PolicyMicrobatch,
    microbatches_of,
    pack_answers,
    rows_multiple,
    unscored,
)
from megatron_m1.rl.sample import Prompt, Sample
from megatron_m1.training.step import StepResult, run_microbatches
from parallel.groups import Groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The model that learns, and how its rows are laid out."""

    wrapped: Sequence[Any]
    """This rank's chunks inside megatron-core's DistributedDataParallel."""
    groups: Groups
    row_tokens: int
    """training.sequence_length."""
    micro_batch: int
    """Rows per microbatch and data-parallel rank."""

    @torch.no_grad()
    def log_probs(self, asked: Sequence[tuple[Prompt, Sample]]) -> list[np.ndarray]:
        """fp32 [S], nats, of each sample's tokens under the present weights; the same on every rank. Collective."""
        if not asked:
            return []
        multiple = rows_multiple(self.groups, self.micro_batch)
        rows, places = pack_answers([unscored(*one) for one in asked], self.row_tokens, multiple)
        found = LogProbs(len(rows), self.row_tokens, self.groups)
        microbatches = microbatches_of(rows, self.groups, self.micro_batch)
        run_microbatches(self.wrapped, microbatches, self.groups, forward_only=True, objective=found)
        return found.by_answer(places)

    def gradients(
        self,
        learned: Sequence[Learned],
        loss: PolicyLossConfig,
        *,
        correction_at_most: float,
        reduce_everywhere: bool = False,
    ) -> tuple[StepResult, RatioStats]:
        """Gradients of one update, left in the chunks' buffers, which must be zero. Collective.

        Args:
            learned: the groups of the update, the same on every rank.
            loss: algorithm and bounds.
            correction_at_most: bound of pi_old / pi_generated.
            reduce_everywhere: leave whole gradients on every rank.
        """
        answers = answers_of(learned, loss, correction_at_most=correction_at_most)
        rows, _ = pack_answers(answers, self.row_tokens, rows_multiple(self.groups, self.micro_batch))
        objective = _PolicyObjective(loss, self.groups)
        result = run_microbatches(
            self.wrapped,
            microbatches_of(rows, self.groups, self.micro_batch),
            self.groups,
            reduce_everywhere=reduce_everywhere,
            objective=objective,
        )
        return result, objective.stats()


class _PolicyObjective:
    """The policy loss of each microbatch, and what its ratios were."""

    def __init__(self, loss: PolicyLossConfig, groups: Groups) -> None:
        self._loss, self._groups = loss, groups
        empty = torch.zeros(0, device=groups.device)
        self._stats = RatioStats.of_tokens(empty, empty, empty, empty, loss.bounds)

    def __call__(self, microbatch: PolicyMicrobatch, losses_T: torch.Tensor) -> torch.Tensor:
        columns = microbatch.columns
        arguments = (-losses_T, columns["old"], columns["advantages"], columns["weights"])
        if self._groups.counts_its_tokens:
            self._stats += RatioStats.of_tokens(*arguments, self._loss.bounds)
        return policy_loss(*arguments, self._loss)

    def stats(self) -> RatioStats:
        """Of the whole update, on every rank; collective."""
        sums_N = self._stats.sums_N
        dist.all_reduce(sums_N)
        return RatioStats(sums_N)
