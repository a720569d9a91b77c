"""Which steps may change the weights: no step with a loss or gradient that is not a number, and no loss spike.

A refused step leaves weights and optimizer as they were, and its batch is passed over: position, schedule and data go
on. What was refused is written down with its samples, so that it can be replayed. Spikes are measured against the
median and the median distance from it of the last accepted losses, which a few wild values do not move; the window
travels in the checkpoint, so a resumed run refuses what the uninterrupted one does.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# The median distance of a normal distribution times this is its standard deviation.
_NORMAL = 1.4826
_LEAST_LOSSES = 20
# Of the median, where the losses are all but equal.
_LEAST_SPREAD = 0.01
REFUSED_NAME = "refused_steps.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthConfig:
    """What is watched, and when a run ends rather than go on."""

    spike_sigmas: float = 0.0
    """Refuse a step whose loss is this many robust standard deviations above the median; 0 refuses no spike."""
    window_steps: int = 128
    """Accepted losses that the median is taken of."""
    max_refused_in_a_row: int = 10
    """More refused steps in a row end the run: the step before them must have broken the weights. It then starts again
    from the newest checkpoint before that step, and passes over it and over the refused ones."""
    hang_timeout_s: float = 1800.0
    """A rank without progress for this long ends the job with a report; longer than any step, evaluation or save in the
    foreground; 0 never does."""
    prometheus_port: int = 0
    """Port of 127.0.0.1 on rank 0's machine where the newest numbers can be read as Prometheus text; 0 opens none."""

    def __post_init__(self) -> None:
        for name in ("spike_sigmas", "hang_timeout_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"health.{name}={getattr(self, name)} is not a limit: it must be above 0, or 0 for none; "
                    "correct it in the run file"
                )
        if self.window_steps < _LEAST_LOSSES:
            raise ValueError(
                f"health.window_steps={self.window_steps} is too few for a median: it must be {_LEAST_LOSSES} or more; "
                "the default is 128"
            )
        if self.max_refused_in_a_row < 1:
            raise ValueError(
                f"health.max_refused_in_a_row={self.max_refused_in_a_row} would end a run at once: it must be 1 or "
                "more; the default is 10"
            )
        if not 0 <= self.prometheus_port < 65536:
            raise ValueError(
                f"health.prometheus_port={self.prometheus_port} is not a port: it must be 1..65535, or 0 for none; "
                "correct it in the run file"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A step whose update was not made."""

    step: int
    """The step, as metrics count it."""
    why: str
    loss_nats: float
    grad_norm: float
    first_sample: int
    """Its samples are `first_sample` to `first_sample + num_samples - 1` of the run's order: enough to replay it."""
    num_samples: int


class BrokenRun(RuntimeError):
    """Too many refused steps in a row."""

    def __init__(self, message: str, broken_step: int) -> None:
        """broken_step: the last step that was made; what was saved after it is broken."""
        super().__init__(message)
        self.broken_step = broken_step


class Judge:
    """Accepts or refuses each step, on all ranks alike: it sees only numbers that are the same on all of them."""

    def __init__(
        self,
        config: HealthConfig,
        agree: Callable[[bool], bool],
        *,
        losses: Sequence[float] = (),
        passed_over: Sequence[int] = (),
        write: Callable[[Refused], None] = lambda _: None,
    ) -> None:
        """Start to judge.

        Args:
            config: the limits.
            agree: collective; whether any rank refuses.
            losses: the window of the checkpoint that the run goes on from.
            passed_over: steps to refuse whatever they show: those that broke an earlier life.
            write: is told of every refused step.
        """
        self._config = config
        self._agree = agree
        self._losses = deque(losses, maxlen=config.window_steps)
        self._passed_over = frozenset(passed_over)
        self._write = write
        self._in_a_row: list[Refused] = []
        self._made: Refused | None = None
        self.refused_steps = 0
        """Refused in this life."""

    @property
    def losses(self) -> list[float]:
        """The window, for the checkpoint."""
        return list(self._losses)

    def accepts(
        self, step: int, loss_nats: float, grad_norm: float, first_sample: int, num_samples: int
    ) -> bool:
        """Whether the step's update is made. Collective.

        Raises:
            BrokenRun: too many refused in a row.
        """
        why = self._objection(step, loss_nats, grad_norm)
        is_refused = self._agree(bool(why))
        refused = Refused(
            step=step,
            why=why or "another rank refused it",
            loss_nats=loss_nats,
            grad_norm=grad_norm,
            first_sample=first_sample,
            num_samples=num_samples,
        )
        if not is_refused:
            self._losses.append(loss_nats)
            self._in_a_row, self._made = [], refused
            return True
        self.refused_steps += 1
        self._write(refused)
        if step not in self._passed_over:
            self._in_a_row.append(refused)
        if len(self._in_a_row) > self._config.max_refused_in_a_row:
            self._give_up(refused.why)
        return False

    def _give_up(self, why: str) -> None:
        first = self._in_a_row[0]
        # in an earlier life, where this one has made no step; a batch is as long as the next one
        before = self._made or replace(
            first, step=first.step - 1, first_sample=max(0, first.first_sample - first.num_samples)
        )
        self._write(replace(before, why=f"the {len(self._in_a_row)} steps after it were refused"))
        raise BrokenRun(
            f"the last {len(self._in_a_row)} steps were refused ({why}): step {before.step} before them has broken the "
            f"weights, or the data from sample {first.first_sample} on are; the run goes on from its newest checkpoint "
            f"before step {before.step} and passes these steps over when it is started again",
            before.step,
        )

    def _objection(self, step: int, loss_nats: float, grad_norm: float) -> str:
        """Why a step is refused; empty when it is not."""
        if step in self._passed_over:
            return "it broke an earlier life"
        for name, value in (("loss", loss_nats), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                return f"{name} is {value}"
        if self._config.spike_sigmas and len(self._losses) >= _LEAST_LOSSES:
            middle = statistics.median(self._losses)
            spread = _NORMAL * statistics.median(abs(loss - middle) for loss in self._losses)
            spread = max(spread, _LEAST_SPREAD * abs(middle))
            if loss_nats > middle + self._config.spike_sigmas * spread:
                return f"loss {loss_nats:.4f} is above {middle:.4f} + {self._config.spike_sigmas:g} x {spread:.4f}"
        return ""


def write_refused(run_dir: Path, refused: Refused) -> None:
    """Append a refused step to the run's list; one rank does."""
    record = {name: getattr(refused, name) for name in Refused.__slots__}
    for name in ("loss_nats", "grad_norm"):
        if not math.isfinite(record[name]):
            record[name] = str(record[name])
    with (run_dir / REFUSED_NAME).open("a", encoding="utf-8") as stream:
        # the line end first: what a killed life left must not spoil this line
        stream.write(("\n" if stream.tell() else "") + json.dumps(record, allow_nan=False) + "\n")


def forget_refused(run_dir: Path, after_step: int) -> None:
    """Drop the refused steps behind a step, whose numbers will stand for other samples; may be repeated."""
    path = run_dir / REFUSED_NAME
    if path.is_file():
        kept = [record for record in refused_steps(run_dir) if record["step"] <= after_step]
        waiting = path.with_name(f"{REFUSED_NAME}.tmp")
        waiting.write_text("".join(f"{json.dumps(record)}\n" for record in kept), encoding="utf-8")
        waiting.replace(path)


def refused_steps(run_dir: Path) -> list[dict[str, Any]]:
    """Every refused step of a run, in the order of its lives."""
    path = run_dir / REFUSED_NAME
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    # a life may have been killed while it wrote a line; the next one then stands behind the torn one
    whole = [line for line in lines if line.startswith("{") and line.endswith("}\n")]
    return [json.loads(line) for line in whole]
