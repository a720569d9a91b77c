"""The repetition stop: generation ends when too many tokens in a row were near certain.

MiniMax-M1 (arXiv 2506.13585, section 3.3) halts after 3,000 consecutive tokens with p > 0.99, because a model that
repeats itself is certain of every token, and such tails destabilise training. Legend: B slots of the generator, S
tokens of one sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class RepetitionConfig:
    """How many near-certain tokens in a row end a sample."""

    tokens: int = 3000
    """Length of the run at windows of `full_window_tokens` and more; 0 switches the stop off."""
    full_window_tokens: int = 40 * 1024
    """M1's smallest window. Below it the run shrinks in proportion, so that the rule means the same in small runs."""
    least_tokens: int = 32
    """The run never shrinks below this: short answers may be certain to the end."""
    probability: float = 0.99
    """A token above this probability, at temperature 1, belongs to a run."""

    def __post_init__(self) -> None:
        if self.tokens < 0 or self.full_window_tokens < 1 or self.least_tokens < 1:
            raise ValueError(
                f"rl.repetition has tokens={self.tokens}, full_window_tokens={self.full_window_tokens}, least_tokens="
                f"{self.least_tokens}: allowed are tokens >= 0 (0 is off) and the others >= 1; M1 uses 3000"
            )
        if not 0.0 < self.probability < 1.0:
            raise ValueError(
                f"rl.repetition.probability={self.probability} can never be passed or always is: it must be in (0, 1); "
                "M1 uses 0.99"
            )

    def limit(self, window_tokens: int) -> int:
        """Length of the run, in tokens, that ends a sample under this window; 0 when off."""
        if not self.tokens:
            return 0
        share = min(1.0, window_tokens / self.full_window_tokens)
        return max(self.least_tokens, math.ceil(self.tokens * share))


class RepetitionStop:
    """Run lengths of all slots of a generator, on its device."""

    def __init__(
        self, config: RepetitionConfig, *, window_tokens: int, slots: int, device: torch.device
    ) -> None:
        self._limit = config.limit(window_tokens)
        self._threshold = math.log(config.probability)
        self._runs_B = torch.zeros(slots, dtype=torch.int64, device=device)

    def update(self, log_probs_B: torch.Tensor) -> torch.Tensor:
        """Count one more token in every slot; bool [B], true where the sample must end now.

        log_probs_B: fp32 [B] in nats at temperature 1; what it holds in idle slots does not matter, since `start`
        resets a slot.
        """
        self._runs_B = torch.where(log_probs_B > self._threshold, self._runs_B + 1, 0)
        return (self._runs_B >= self._limit) & bool(self._limit)

    def start(self, slot: int, earlier_log_probs_S: np.ndarray | None = None) -> None:
        """Put another sample into a slot; a carried-over one continues the run that it was cut in."""
        earlier = np.zeros(0) if earlier_log_probs_S is None else earlier_log_probs_S
        self._runs_B[slot] = trailing_run(np.asarray(earlier), self._threshold)


def trailing_run(log_probs_S: np.ndarray, threshold: float) -> int:
    """Tokens at the end of a sample that are all above the threshold, in nats."""
    others = np.flatnonzero(log_probs_S <= threshold)
    return len(log_probs_S) - (int(others[-1]) + 1 if len(others) else 0)


def repeats_at(config: RepetitionConfig, window_tokens: int, log_probs_S: np.ndarray) -> int | None:
    """Tokens of a whole sample after which the stop would have ended it; None where it would not."""
    limit = config.limit(window_tokens)
    if not limit or len(log_probs_S) < limit:
        return None
    certain_S = np.concatenate([[0], np.cumsum(log_probs_S > math.log(config.probability))])
    ends = np.flatnonzero(certain_S[limit:] - certain_S[:-limit] == limit)
    return int(ends[0]) + limit if len(ends) else None
