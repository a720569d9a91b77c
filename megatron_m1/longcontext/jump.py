"""Watches the gradients behind a jump to longer rows: when they explode, and in which layers.

MiniMax-M1 reports that aggressive jumps of the length made gradients explode at once, because layers at different
depths decay at different rates; it therefore went from 32K to 1M in four stages (arXiv 2506.13585, section 2.2). How
an explosion was told from noise is not published. Here: on the logarithm of the norm, against the median of the
stage before, in robust standard deviations, over several steps in a row. What follows from one is decided elsewhere.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

JumpAnswer = Literal["insert", "lower_rate", "stop", "report"]
_ANSWERS = ("insert", "lower_rate", "stop", "report")
# The median distance of a normal distribution times this is its standard deviation.
_NORMAL = 1.4826
# In natural logarithms of the norm, where the stage before was all but even.
_LEAST_SPREAD = 0.2
_LEAST_NORMS = 8
_TINY = 1e-30
_REPORTED_PARTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthJumpConfig:
    """When gradients count as exploded behind a jump to longer rows, and what the run does then."""

    sigmas: float = 8.0
    """Robust standard deviations of ln(norm) above the median of the stage before; at least 5 times the median, since
    the deviation counts as 0.2 or more. 0 watches nothing."""
    patience_steps: int = 3
    """Steps in a row above the limit, or refused ones, that make an explosion."""
    window_steps: int = 32
    """Last steps of the stage before that are the measure."""
    watch_steps: int = 500
    """Steps of the longer stage that are watched."""
    answer: JumpAnswer = "insert"
    """`insert`: go back to the start of the stage and put one of an intermediate length before it. `lower_rate`: go
    back and take the stage again at a lower rate. `stop`: end the run. `report`: say it and go on."""
    rate_factor: float = 0.5
    """Learning rates of the stages that follow from an answer are multiplied by this."""
    token_share: float = 0.25
    """Tokens of an inserted stage, as a share of those of the stage it prepares."""
    most_answers: int = 4
    """Answers in a whole run; one more explosion ends it."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigmas) and self.sigmas >= 0):
            raise ValueError(
                f"length_jump.sigmas={self.sigmas} is not a limit: it must be above 0, or 0 to watch nothing; "
                "the default is 8"
            )
        if self.answer not in _ANSWERS:
            raise ValueError(
                f"length_jump.answer={self.answer!r} is unknown: choose from {', '.join(_ANSWERS)}; 'report' never "
                "changes a run"
            )
        for name, least in (("patience_steps", 1), ("window_steps", _LEAST_NORMS), ("watch_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"length_jump.{name}={getattr(self, name)} is too few: it must be {least} or more; "
                    "correct it in the run file"
                )
        if self.most_answers < 1:
            raise ValueError(
                f"length_jump.most_answers={self.most_answers} allows no answer: it must be 1 or more; for a run that "
                "ends at once set length_jump.answer=stop"
            )
        for name in ("rate_factor", "token_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"length_jump.{name}={getattr(self, name)} is no share: it must be above 0 and at most 1; "
                    "correct it in the run file"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Explosion:
    """Gradients that exploded behind a jump of the length."""

    step: int
    """The step that showed it, as metrics count steps."""
    grad_norm: float
    usual_norm: float
    """Median of the stage before."""
    steps_in_a_row: int
    growth: dict[str, float]
    """Norm of each part of the model at that step over its median in the stage before, infinite where the norm is no
    number; a part is a kind of layer and its depth."""

    def sentences(self) -> list[str]:
        """What happened and where, the worst parts first."""
        worst = sorted(self.growth.items(), key=lambda pair: -pair[1])[:_REPORTED_PARTS]
        return [
            f"gradients exploded: norm {self.grad_norm:.4g} at step {self.step} where the stage before had "
            f"{self.usual_norm:.4g}, for {self.steps_in_a_row} steps in a row",
            "most grown: " + ", ".join(f"{name} x {growth:.3g}" for name, growth in worst),
        ]


class JumpWatch:
    """Looks at the gradient norms of one stage, on all ranks alike: it sees only numbers that all of them have."""

    def __init__(
        self,
        config: LengthJumpConfig,
        stage: str,
        parts: Sequence[str],
        *,
        is_jump: bool,
        saved: dict[str, Any] | None = None,
    ) -> None:
        """Start to watch.

        Args:
            config: the limits.
            stage: name of the stage.
            parts: names of the parts of the model, in the order of their norms.
            is_jump: whether the stage has longer rows than the one before it.
            saved: `state` of the checkpoint that the stage begins with or goes on from; None at a fresh start.
        """
        self._config, self._stage, self._parts, self._is_jump = config, stage, tuple(parts), is_jump
        saved = saved or {"stage": None, "before": [], "recent": [], "num_seen": 0, "in_a_row": 0}
        is_same = saved["stage"] == stage
        # each entry is a step: the whole norm, then the parts'
        self._before: list[list[float]] = saved["before"] if is_same else saved["recent"]
        self._recent = deque(saved["recent"] if is_same else [], maxlen=config.window_steps)
        self._num_seen: int = saved["num_seen"] if is_same else 0
        self._in_a_row: int = saved["in_a_row"] if is_same else 0

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        return {
            "stage": self._stage,
            "before": self._before,
            "recent": list(self._recent),
            "num_seen": self._num_seen,
            "in_a_row": self._in_a_row,
        }

    def saw(
        self, step: int, grad_norm: float, part_norms: Sequence[float], *, was_made: bool
    ) -> Explosion | None:
        """Look at one step; the explosion that it completes, if it does.

        Args:
            step: as metrics count steps.
            grad_norm: of the whole gradient, before clipping.
            part_norms: of its parts.
            was_made: whether the step changed the weights; a refused one counts as above the limit.
        """
        self._num_seen += 1
        entry = [grad_norm, *part_norms]
        is_sound = was_made and all(math.isfinite(norm) for norm in entry)
        if is_sound and not (self._is_watched and _ln(grad_norm) > self._limit):
            self._in_a_row = 0
            self._recent.append(entry)
            return None
        if not self._is_watched:
            return None
        self._in_a_row += 1
        if self._in_a_row < self._config.patience_steps:
            return None
        return self._explosion(step, entry)

    @property
    def _is_watched(self) -> bool:
        has_measure = len(self._before) >= _LEAST_NORMS
        watches = self._is_jump and self._config.sigmas > 0
        return watches and has_measure and self._num_seen <= self._config.watch_steps

    @property
    def _limit(self) -> float:
        """Of ln(norm)."""
        logs = [_ln(entry[0]) for entry in self._before]
        middle = statistics.median(logs)
        spread = _NORMAL * statistics.median(abs(value - middle) for value in logs)
        return middle + self._config.sigmas * max(spread, _LEAST_SPREAD)

    def _explosion(self, step: int, entry: Sequence[float]) -> Explosion:
        usual, *usual_parts = (statistics.median(norms) for norms in zip(*self._before, strict=True))
        growth = {
            name: norm / max(before, _TINY) if math.isfinite(norm) else math.inf
            for name, norm, before in zip(self._parts, entry[1:], usual_parts, strict=True)
        }
        return Explosion(
            step=step,
            grad_norm=entry[0],
            usual_norm=usual,
            steps_in_a_row=self._in_a_row,
            growth=growth,
        )


def _ln(norm: float) -> float:
    return math.log(max(norm, _TINY))
