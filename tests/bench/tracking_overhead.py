"""What MLflow costs a training step: the same steps with tracking on and off, alternating in one process.

    python tests/bench/tracking_overhead.py [pairs of blocks, default 6]

A step is a small matrix training step on one CPU thread. Each block of steps is timed with the
sink sending to a SQLite file in a temporary directory, and with MLflow off; the record on the disk is written in both.
The order within a pair alternates, so a machine that slows down in between slows both. A block is timed in steady
state, after steps that are not timed, and the sink is given time to finish before the other block begins and would pay
for it. Printed: wall time per step and the ratio by pair with its spread; the same for the CPU time of the process,
which other programs on the machine disturb less and which bounds the slowdown of one thread; and the first seconds of
a run, in which the sink imports MLflow and creates the database.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from megatron_m1.training.metrics import StepMetrics
from megatron_m1.training.tracking import RunDescription, Tracking, TrackingConfig

BLOCK_S = 5.0
# Longer than the second between two sends of the sink.
SETTLING_S = 2.0
WIDTH = 512
ROWS = 512


def make_model() -> torch.nn.Module:
    layers = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(6)]
    return torch.nn.Sequential(*(part for layer in layers for part in (layer, torch.nn.SiLU())))


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, x_BD: torch.Tensor) -> float:
    optimizer.zero_grad()
    loss = model(x_BD).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


class Block:
    """Steps of one model, logged to one run; returns the time of each step, logging included."""

    def __init__(self, tracking: Tracking) -> None:
        self.tracking = tracking
        self._model = make_model()
        self._optimizer = torch.optim.AdamW(self._model.parameters())
        self._x_BD = torch.randn(ROWS, WIDTH)
        self._step = 0

    def run(self, duration_s: float) -> list[float]:
        times_s: list[float] = []
        deadline_s = time.perf_counter() + duration_s
        while not times_s or time.perf_counter() < deadline_s:
            start_s = time.perf_counter()
            self._step += 1
            loss = train_step(self._model, self._optimizer, self._x_BD)
            self.tracking.log_step(
                StepMetrics(
                    step=self._step, loss_nats=loss, learning_rate=1e-3, consumed_samples=self._step * ROWS,
                    consumed_tokens=self._step * ROWS, step_time_s=0.04, tokens_per_s=ROWS / 0.04,
                    auxiliary_loss=0.1, grad_norm=1.0, model_tflops_per_s=0.1,
                )
            )  # fmt: skip
            times_s.append(time.perf_counter() - start_s)
        return times_s


def main() -> None:
    num_pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        off = Block(start(Path(directory) / "off", is_enabled=False))
        off.run(SETTLING_S)
        settled_s = statistics.mean(off.run(BLOCK_S))
        on = Block(start(Path(directory) / "on", is_enabled=True))
        opening_s = open_run(on)
        pairs = measure(on, off, num_pairs)
        for block in (on, off):
            block.tracking.close(timeout_s=60.0)
    for index, name in enumerate(("wall time", "CPU time")):
        report(name, [pair[True][index] for pair in pairs], [pair[False][index] for pair in pairs])
    excess = sum(opening_s) / (settled_s * len(opening_s))
    print(
        f"while the run is opened: {len(opening_s)} steps in {sum(opening_s):.1f} s, ratio {excess:.3f} to off"
    )


def start(directory: Path, is_enabled: bool) -> Tracking:
    return Tracking(TrackingConfig(enabled=is_enabled), directory, RunDescription(name="overhead"))


def open_run(on: Block) -> list[float]:
    """Train until the sink has its run: the import and the database share the interpreter with the trainer."""
    times_s: list[float] = []
    while on.tracking.run_id is None:
        times_s += on.run(0.0)
        assert sum(times_s) < 300, "MLflow has not created a run in 300 s"
    return times_s


def measure(on: Block, off: Block, num_pairs: int) -> list[dict[bool, tuple[float, float]]]:
    """Per pair, by whether MLflow was on: seconds of wall time and of CPU time per step."""
    pairs = []
    for pair in range(num_pairs):
        step_s = {}
        for is_on in (True, False) if pair % 2 else (False, True):
            block = on if is_on else off
            block.run(SETTLING_S)
            cpu_start_s = time.process_time()
            times_s = block.run(BLOCK_S)
            cpu_s = time.process_time() - cpu_start_s
            time.sleep(SETTLING_S)
            # Means and not medians: the sink's work falls on few steps.
            step_s[is_on] = statistics.mean(times_s), cpu_s / len(times_s)
        pairs.append(step_s)
    return pairs


def report(name: str, on_s: list[float], off_s: list[float]) -> None:
    """Print one row: both step times, and the ratio with its quartiles over the pairs."""
    ratios = [on / off for on, off in zip(on_s, off_s, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        f"{name} per step: off {1e3 * statistics.mean(off_s):.2f} ms, on {1e3 * statistics.mean(on_s):.2f} ms; "
        f"ratio on/off by pair (n={len(ratios)}): median {middle:.4f}, quartiles {low:.4f} to {high:.4f}"
    )


if __name__ == "__main__":
    main()
