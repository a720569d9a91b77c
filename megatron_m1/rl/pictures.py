"""Rewards over steps as pictures, from the record of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_m1.training.spool import read_steps


def batches_of(run_dir: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Metrics of every generation batch of a run's record, under `step` the step of its first update.

    Raises:
        ValueError: the run has no record, or none of reinforcement learning.
    """
    record = run_dir / "metrics.jsonl"
    steps = read_steps(record) if record.is_file() else {}
    first: dict[int, dict[str, Any]] = {}
    for step, values in sorted(steps.items()):
        if "pass_rate" in values:
            first.setdefault(values["rl_batch"], values | {"step": step})
    if not first:
        raise ValueError(
            f"run directory {run_dir} has no record of reinforcement learning: a stage of kind 'rl' writes one; name "
            "the directory of such a run"
        )
    return {name: np.array([values[name] for values in first.values()]) for name in ("step", *names)}


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Running mean over the last `width` values; fewer at the beginning."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def reward_picture(run_dir: Path, path: Path, *, width: int = 5) -> tuple[float, float]:
    """Draw pass rate, entropy and answer length of a run; the smoothed pass rate at its beginning and its end."""
    found = batches_of(run_dir, ("pass_rate", "entropy_nats", "length_tokens_mean"))
    steps = found["step"] - found["step"][0]
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    rates = smoothed(found["pass_rate"], width)
    left.plot(steps, found["pass_rate"], color="#2f6fb0", alpha=0.3, linewidth=1)
    left.plot(steps, rates, color="#2f6fb0", linewidth=2)
    left.set_ylim(0, 1)
    left.set_ylabel("share of right answers, prompts seen once")
    left.grid(alpha=0.3)
    right.plot(steps, found["entropy_nats"], color="#c2571a", linewidth=1.6)
    right.set_ylim(bottom=0)
    right.set_ylabel("nats per generated token")
    for axes in (left, right):
        axes.set_xlabel("updates of the policy")
    _save(figure, path)
    return float(found["pass_rate"][0]), float(rates[-1])


def band_picture(
    bands: Mapping[str, tuple[np.ndarray, np.ndarray]], steps: np.ndarray, path: Path, *, label: str
) -> None:
    """A curve per name with its band.

    bands: name -> (mean, half width of the band), each [batches].
    """
    figure = Figure(figsize=(7.2, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (name, (mean, half)), color in zip(bands.items(), ("#2f6fb0", "#c2571a", "#5b8c3e"), strict=False):
        axes.plot(steps, mean, label=name, color=color, linewidth=1.8)
        axes.fill_between(steps, mean - half, mean + half, color=color, alpha=0.18, linewidth=0)
    axes.set_ylim(0, 1)
    axes.set_xlabel("updates of the policy")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
