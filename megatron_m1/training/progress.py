"""The line a user watches: one live line on a terminal, plain log lines anywhere else."""

import logging
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from megatron_m1.training.metrics import StepMetrics

logger = logging.getLogger(__name__)

_LOG_INTERVAL_S = 10.0
_SMOOTHING = 0.1


class Progress:
    """Shows step, loss, tokens/s, grad norm and the time left; use it as a context manager on one rank.

    On a terminal the line is redrawn in place. Otherwise (a file, a batch job) a log line is written for the
    first and the last step and at most every ten seconds between, so that the log of a long run stays
    readable.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 1,
        console: Console | None = None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`first_step` is the first step of this life; `clock_s` is the clock that spaces the log lines."""
        self._total_steps = total_steps
        self._first_step = first_step
        self._console = console or Console(stderr=True)
        self._clock_s = clock_s
        self._last_log_s: float | None = None
        self._smooth_step_time_s: float | None = None
        self._live: Live | None = None

    def update(self, metrics: StepMetrics) -> None:
        """Show a finished step."""
        smooth = self._smooth_step_time_s
        if smooth is None or metrics.step <= self._first_step + 1:
            # The first step also pays for compilation and allocation: it must not weigh on the estimate for
            # long.
            smooth = metrics.step_time_s
        self._smooth_step_time_s = smooth + _SMOOTHING * (metrics.step_time_s - smooth)
        if self._live is not None:
            self._live.update(self._line(metrics), refresh=False)
        elif self._log_is_due(metrics.step):
            logger.info("%s", " ".join(self._cells(metrics)))

    def seconds_left(self, step: int) -> float:
        """Estimated time for the steps after `step`, from a running mean of the step time."""
        return (self._total_steps - step) * (self._smooth_step_time_s or 0.0)

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _log_is_due(self, step: int) -> bool:
        now_s = self._clock_s()
        is_due = self._last_log_s is None or now_s - self._last_log_s >= _LOG_INTERVAL_S
        if is_due or step == self._total_steps:
            self._last_log_s = now_s
            return True
        return False

    def _cells(self, metrics: StepMetrics) -> list[str]:
        cells = [
            f"step {metrics.step}/{self._total_steps}",
            f"loss {metrics.loss_nats:.4f} nats",
            f"{short_count(metrics.tokens_per_s)} tokens/s",
        ]
        if metrics.grad_norm is not None:
            cells.append(f"grad norm {metrics.grad_norm:.3g}")
        if metrics.mfu is not None:
            cells.append(f"mfu {metrics.mfu:.1%}")
        return [*cells, f"eta {duration(self.seconds_left(metrics.step))}"]

    def _line(self, metrics: StepMetrics) -> Table:
        line = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=self._total_steps, completed=metrics.step, width=20)
        line.add_row(bar, *self._cells(metrics))
        return line


def short_count(value: float) -> str:
    """Three significant digits with k, M, G, T: 1234 is `1.23k`."""
    for suffix in ("", "k", "M", "G"):
        # 999.5 would be rounded up to a fourth digit.
        if abs(value) < 999.5:
            return f"{value:.3g}{suffix}"
        value /= 1000
    return f"{value:.3g}T"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, with days in front of them where there are any."""
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02d}:{rest_s:02d}"
    return f"{days}d {clock}" if days else clock
