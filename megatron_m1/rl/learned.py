"""A scored group on its way into an update: its advantages, and the trainer's own old log-probabilities.

pi_old of a ratio is the trainer's forward pass under the weights that finished the group, not what the engine said:
rounding of another engine, and the older weights behind the first part of a carried-over sample, are corrected by the
bounded weight pi_old / pi_generated instead. Legend: G samples of a group, S tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_m1.rl.advantage import group_advantages
from megatron_m1.rl.cispo import BatchCounts, PolicyLossConfig, correction, token_weight
from megatron_m1.rl.sample import Group, Sample


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """One group with all that its update needs."""

    group: Group
    old_log_probs: tuple[np.ndarray, ...]
    """fp32 [S] of each sample, in nats."""

    @property
    def advantages_G(self) -> np.ndarray:
        """fp64 [G]."""
        return group_advantages(self.group.rewards_G)

    @property
    def oldest_version(self) -> int:
        """Of all its tokens."""
        return min(sample.oldest_version for sample in self.group.samples)

    @property
    def num_tokens(self) -> int:
        """Generated tokens."""
        return sum(len(sample.tokens_S) for sample in self.group.samples)


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """A prompt with one answer, and what the loss must know of each generated token."""

    prompt_S: np.ndarray
    sample: Sample
    old_S: np.ndarray
    advantage: float
    weights_S: np.ndarray


def answers_of(
    groups: Sequence[Learned], config: PolicyLossConfig, *, correction_at_most: float
) -> list[Answer]:
    """The samples of one update with their weights; the counts are of exactly these groups.

    A sample without a reward has no advantage and takes no part.
    """
    used = [[not np.isnan(reward) for reward in learned.group.rewards_G] for learned in groups]
    lengths = [
        [len(sample.tokens_S) for sample, is_used in zip(learned.group.samples, mask, strict=True) if is_used]
        for learned, mask in zip(groups, used, strict=True)
    ]
    counts = BatchCounts(tokens=sum(map(sum, lengths)), samples=sum(map(len, lengths)), groups=len(groups))
    found = []
    for learned, mask, group_lengths in zip(groups, used, lengths, strict=True):
        rows = zip(learned.group.samples, learned.old_log_probs, learned.advantages_G, mask, strict=True)
        for sample, old_S, advantage, is_used in rows:
            if not is_used:
                continue
            weight = token_weight(
                config, counts, sample_tokens=len(sample.tokens_S), group_tokens=sum(group_lengths)
            )
            corrected_S = correction(
                torch.from_numpy(old_S), torch.from_numpy(sample.log_probs_S), at_most=correction_at_most
            )
            found.append(
                Answer(
                    learned.group.prompt.tokens_S,
                    sample,
                    old_S,
                    float(advantage),
                    weight * corrected_S.numpy(),
                )
            )
    return found
