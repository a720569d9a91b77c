"""How far the probabilities of generation and training are apart, on the same tokens under the same weights.

MiniMax-M1 (arXiv 2506.13585, section 3.3 and Figure 3) found that this mismatch stops rewards from growing, located it
in the head, and measured it as the correlation of the two probabilities: 0.987 before its FP32 head, 0.997 after.
Legend: T tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_PERCENTILES = (50, 99, 100)
# below this spread of either side, a correlation says nothing about the agreement
_LEAST_SPREAD = 1e-2


class MismatchError(RuntimeError):
    """Generation and training disagree too much to learn from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MismatchConfig:
    """When a run ends because its engine and its trainer are not the same model."""

    least_correlation: float = 0.99
    """Least Pearson correlation of the two probabilities; MiniMax-M1 could not learn at 0.987. -1 only watches."""
    most_p99_nats: float = 1.0
    """Most difference of log-probabilities, in nats, that 99 % of the tokens may have."""
    least_tokens: int = 64
    """Fewer tokens are measured and not judged."""

    def __post_init__(self) -> None:
        if not -1 <= self.least_correlation < 1 or not self.most_p99_nats > 0 or self.least_tokens < 2:
            raise ValueError(
                f"rl.mismatch has least_correlation={self.least_correlation}, most_p99_nats={self.most_p99_nats}, "
                f"least_tokens={self.least_tokens}: allowed are a correlation in [-1, 1), a limit above 0 and 2 tokens "
                "or more; 0.99, 1 and 64 are the defaults"
            )


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One measurement."""

    num_tokens: int
    correlation: float
    """Pearson's, of probabilities; 1 where they are all but constant, and then the percentiles decide."""
    nats: tuple[float, ...]
    """Percentiles 50, 99 and 100 of the distance of log-probabilities."""

    def metrics(self) -> dict[str, float]:
        """Names and values for the tracker."""
        names = [f"mismatch_nats_p{percent}" for percent in _PERCENTILES]
        return dict(zip(names, self.nats, strict=True)) | {
            "mismatch_correlation": self.correlation,
            "mismatch_tokens": self.num_tokens,
        }


def measure(trained_T: np.ndarray, generated_T: np.ndarray) -> Mismatch:
    """Compare the log-probabilities, in nats, of the same tokens; no tokens are no mismatch."""
    if not len(trained_T):
        return Mismatch(0, 1.0, (0.0,) * len(_PERCENTILES))
    trained, generated = trained_T.astype(np.float64), generated_T.astype(np.float64)
    nats = np.percentile(np.abs(trained - generated), _PERCENTILES)
    p, q = np.exp(trained), np.exp(generated)
    correlation = 1.0
    if min(p.std(), q.std()) > _LEAST_SPREAD:
        correlation = float(np.corrcoef(p, q)[0, 1])
    return Mismatch(len(trained), correlation, tuple(float(value) for value in nats))


def check(found: Mismatch, config: MismatchConfig) -> None:
    """End a run whose samples do not come from its policy.

    Raises:
        MismatchError: too low a correlation, or too large a distance; also where they are no numbers.
    """
    if found.num_tokens < config.least_tokens:
        return
    agrees = found.correlation >= config.least_correlation and found.nats[1] <= config.most_p99_nats
    if not agrees or math.isnan(found.correlation):
        raise MismatchError(
            f"generation and training disagree on {found.num_tokens} tokens: correlation {found.correlation:.5f}, 99 % "
            f"within {found.nats[1]:.4f} nats; allowed are a correlation of at least {config.least_correlation} "
            f"(rl.mismatch.least_correlation) and {config.most_p99_nats} nats (rl.mismatch.most_p99_nats): check that "
            "the engine has the trainer's newest weights and an FP32 head, or relax the limits"
        )
