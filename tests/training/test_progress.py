"""The progress line shows the step's numbers and becomes sparse log lines where there is no terminal."""

import io
import logging
import re

import pytest
from rich.console import Console

from megatron_m1.training.metrics import StepMetrics
from megatron_m1.training.progress import Progress, duration, short_count


def step_metrics(step: int, step_time_s: float = 2.0, mfu: float | None = None) -> StepMetrics:
    return StepMetrics(
        step=step, loss_nats=5.4321, learning_rate=1e-3, consumed_samples=8 * step, consumed_tokens=800 *
        step, step_time_s=step_time_s, tokens_per_s=12345.0, grad_norm=0.987, mfu=mfu,
    )  # fmt: skip


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def plain_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def test_a_terminal_shows_one_line_with_every_number() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=140, legacy_windows=False)
    with Progress(300, console=console) as progress:
        for step in range(1, 11):
            progress.update(step_metrics(step, mfu=0.3456))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    for part in (
        "step 10/300",
        "loss 5.4321 nats",
        "12.3k tokens/s",
        "grad norm 0.987",
        "mfu 34.6%",
        "eta 0:09:40",
    ):
        assert part in shown, part


def test_without_a_terminal_log_lines_are_first_last_and_ten_seconds_apart(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    with Progress(100, console=plain_console(), clock_s=clock) as progress:
        for step in range(1, 101):
            clock.now_s = 3.0 * step
            progress.update(step_metrics(step))
    steps = [int(re.search(r"step (\d+)/100", line)[1]) for line in caplog.messages]  # type: ignore[index]
    # Every fourth step of 3 s is the first one ten seconds after the line before.
    assert steps == [*range(1, 98, 4), 100]
    assert caplog.messages[0] == ("step 1/100 loss 5.4321 nats 12.3k tokens/s grad norm 0.987 eta 0:03:18")


def test_a_slow_first_step_does_not_spoil_the_estimate() -> None:
    progress = Progress(1001, first_step=501, console=plain_console())
    progress.update(step_metrics(501, step_time_s=600.0))
    progress.update(step_metrics(502, step_time_s=2.0))
    assert progress.seconds_left(502) == pytest.approx(499 * 2.0)


def test_the_estimate_follows_a_lasting_change_and_not_one_outlier() -> None:
    progress = Progress(1000, console=plain_console())
    for step in range(1, 51):
        progress.update(step_metrics(step, step_time_s=1.0))
    progress.update(step_metrics(51, step_time_s=11.0))
    # One step of 11 s moves a mean of 1 s by a tenth of the difference.
    assert progress.seconds_left(51) == pytest.approx(949 * 2.0)
    for step in range(52, 152):
        progress.update(step_metrics(step, step_time_s=3.0))
    assert progress.seconds_left(151) == pytest.approx(849 * 3.0, rel=1e-3)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (12.34, "12.3"),
        (999.4, "999"),
        (999.6, "1k"),
        (1234, "1.23k"),
        (4.5e7, "45M"),
        (7e12, "7T"),
    ],
)
def test_counts_are_short(value: float, text: str) -> None:
    assert short_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (90061, "1d 1:01:01")]
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text
