"""CISPO, DAPO and GRPO: `python -m tests.bench.policy_losses OUT SEEDS UPDATES RATE GROUPS`; needs `m1 data demo`.

A controlled comparison in miniature of MiniMax-M1 (arXiv 2506.13585, Figure 2): for every seed one warm start, from
which the three losses go on with the same prompts in the same order, the same schedule of 16 off-policy updates per
generation batch, and the same settings otherwise. Every run is an `m1 train` of the preset `rl-tiny` in one process.
RATE is the learning rate, GROUPS how many groups a generation batch has; every update learns from a 16th of them.
OUT gets a picture with confidence bands, the numbers as JSON, and the runs. It may be ended (SIGTERM) and started
again: a run that has finished is not repeated, and one that was ended goes on from where it was.
"""

from __future__ import annotations

import concurrent.futures
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from megatron_m1.config import load_run
from megatron_m1.rl.pictures import band_picture, batches_of, smoothed

LOSSES = ("cispo", "dapo", "grpo")
WIDTH = 3
"""Generation batches that a point of a curve is the mean of."""
UPDATES_PER_BATCH = 16
# seeds at once, a core each
AT_ONCE = 2
_OVERRIDES = (
    "layout={tp: 1, pp: 1}",
    "tracking.enabled=false",
    f"rl.updates_per_batch={UPDATES_PER_BATCH}",
    "rl.table_every_batches=0",
    "checkpoint.every_steps=0",
    "checkpoint.keep=0",
    # a decay would end the comparison wherever it is set
    "stages.1.schedule.constant_steps=0",
    "stages.1.schedule.decay=none",
    "stages.1.schedule.decay_steps=0",
    # longer than the preset's: with some seeds nothing is right after 80 steps, and then there is nothing to compare
    "stages.0.training.steps=110",
)


def train(out: Path, seed: int, loss: str, updates: int, settings: Sequence[str]) -> Path:
    """One run, from the warm start of its seed where there is one; its directory."""
    run_dir = out / f"{loss}-{seed}"
    outcome = run_dir / "outcome.txt"
    if outcome.is_file() and outcome.read_text().startswith("finished"):
        return run_dir
    overrides = (
        *_OVERRIDES,
        f"run_dir={run_dir}",
        f"seed={seed}",
        f"rl.loss.algorithm={loss}",
        f"stages.1.training.steps={updates}",
        *settings,
    )
    warm_steps = load_run("rl-tiny", overrides).stages[0].training["steps"]
    place = Path("checkpoints") / f"step_{warm_steps:08d}"
    if loss != LOSSES[0] and not (run_dir / place).is_dir():
        half = out / f"half-{seed}"
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(out / f"{LOSSES[0]}-{seed}" / place, half / place)
        half.rename(run_dir)
    command = [sys.executable, "-W", "ignore", "-m", "megatron_m1", "train", "rl-tiny", *overrides]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return run_dir


def main(out: Path, num_seeds: int, updates: int, rate: float, groups: int) -> None:
    """Train all, then draw and print."""
    settings = f"stages.1.schedule.peak_learning_rate={rate}", f"rl.groups_per_batch={groups}"

    def train_seed(seed: int) -> list[Path]:
        return [train(out, seed, loss, updates, settings) for loss in LOSSES]

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        by_seed = list(pool.map(train_seed, range(num_seeds)))
    runs = dict(zip(LOSSES, map(list, zip(*by_seed, strict=True)), strict=True))
    found = {loss: [batches_of(run, ("pass_rate",)) for run in own] for loss, own in runs.items()}
    # batches with fewer groups than updates are shorter, so that runs are compared at updates and not at batches
    steps = np.arange(0.0, updates, UPDATES_PER_BATCH)
    curves = {
        loss: np.stack(
            [
                np.interp(steps, batches["step"] - batches["step"][0], smoothed(batches["pass_rate"], WIDTH))
                for batches in own
            ]
        )
        for loss, own in found.items()
    }
    bands = {f"{loss} ({num_seeds} seeds)": band for loss, band in within_seeds(curves).items()}
    band_picture(bands, steps, out / "policy_losses.png", label="share of right answers")
    dropped = {loss: _dropped(runs[loss]) for loss in LOSSES}
    (out / "policy_losses.json").write_text(
        json.dumps(
            {
                "steps": steps.tolist(),
                "curves": {k: v.tolist() for k, v in curves.items()},
                "dropped": dropped,
            }
        )
    )
    print(table(curves, steps, dropped))


def _dropped(runs: list[Path]) -> float:
    """Share of the tokens below probability 0.2 whose gradient clipping in the style of PPO drops (DAPO's bounds for
    CISPO, which itself drops none), over all updates of all seeds."""
    from megatron_m1.training.spool import read_steps

    dropped = low = 0.0
    for run in runs:
        before = 0
        for values in read_steps(run / "metrics.jsonl").values():
            if values.get("update_skipped") == 0:
                tokens = (values["trained_tokens"] - before) * values["low_probability_share"]
                dropped, low = dropped + tokens * values["low_probability_ppo_dropped_share"], low + tokens
            before = values.get("trained_tokens", 0)
    return dropped / low


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds and half of its 95 % confidence interval, by Student's t; values: [seeds, ...]."""
    quantile = stats.t.ppf(0.975, len(values) - 1)
    return values.mean(0), quantile * values.std(0, ddof=1) / np.sqrt(len(values))


def within_seeds(curves: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Means, and 95 % bands without what a seed's warm start does to all losses alike: those bands may be compared.

    Each seed's mean over the losses is replaced by the mean of all, and the variance corrected for it.
    Source: Morey, Confidence intervals from normalized data, Tutorials in Quantitative Methods for Psychology 2008.
    """
    seeds = np.mean(list(curves.values()), axis=0)
    factor = np.sqrt(len(curves) / (len(curves) - 1))
    found = {}
    for loss, values in curves.items():
        mean, error = mean_and_error(values - seeds + seeds.mean(0))
        found[loss] = mean, factor * error
    return found


def table(curves: dict[str, np.ndarray], steps: np.ndarray, dropped: dict[str, float]) -> str:
    """What a reader asks: where each ends, how soon each reaches DAPO's best, and what clipping drops."""
    target = float(curves["dapo"].mean(0).max())
    reached = {loss: _first(values.mean(0), target, steps) for loss, values in curves.items()}
    lines = [
        "| loss | first | last (95 %) | best | over the run (95 %) | updates to DAPO's best | fork tokens dropped |",
        "|---|---|---|---|---|---|---|",
    ]
    for loss, values in curves.items():
        mean, error = mean_and_error(values)
        run, run_error = mean_and_error(values.mean(1))
        lines.append(
            f"| {loss} | {mean[0]:.3f} | {mean[-1]:.3f} +- {error[-1]:.3f} | {mean.max():.3f} | {run:.3f} +- "
            f"{run_error:.3f} | {_told(reached[loss])} | {dropped[loss]:.1%} |"
        )
    for loss in LOSSES[1:]:
        # the same warm start and prompts for each seed: seeds are compared in pairs
        mean, error = mean_and_error((curves[LOSSES[0]] - curves[loss]).mean(1))
        lines.append(
            f"CISPO less {loss.upper()}, over the run, seed by seed: {mean:+.3f} +- {error:.3f} (95 %)."
        )
    each = [
        "/".join(_told(_first(curves[loss][n], target, steps)) for loss in LOSSES)
        for n in range(len(curves["dapo"]))
    ]
    lines.append(f"Updates to {target:.3f} of each seed, {'/'.join(LOSSES)}: {'; '.join(each)}.")
    ours, theirs = reached["cispo"], reached["dapo"]
    if ours is None or theirs is None:
        lines.append(f"CISPO did not reach DAPO's best mean of {target:.3f} in these updates.")
    else:
        verdict = "at most half" if ours <= theirs / 2 else "more than half"
        lines.append(
            f"CISPO reached DAPO's best mean of {target:.3f} in {verdict} of its updates ({ours:.0f}/{theirs:.0f})."
        )
    return "\n".join(lines)


def _told(step: float | None) -> str:
    return "not reached" if step is None else f"{step:.0f}"


def _first(mean: np.ndarray, target: float, steps: np.ndarray) -> float | None:
    reached = np.flatnonzero(mean >= target)
    return float(steps[reached[0]]) if len(reached) else None


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))
