"""The loop as `m1 train` runs it: it learns in both precisions, ramps the batch, evaluates, and refuses other data."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_m1.training.spool import read_steps
from parallel.manifest import read_manifest
from tests import tolerances
from tests.spawn import ROOT
from tests.training import lives
from tests.training.tiny_run import SMALLEST, VOCAB, data_in, write_run_file, write_shards

pytestmark = pytest.mark.multiprocess

STEPS = 20
ONE_RANK = {"model": SMALLEST["model"], "layout": {"tp": 1, "ep": 1}}


def _train(run_file: Path, *overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", "-m", "megatron_m1", "train", str(run_file), *overrides]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_a_run_learns_to_count_and_reports_every_number(precision: str, tmp_path: Path) -> None:
    write_shards(tmp_path)
    run_file = write_run_file(tmp_path / "run", data_in(tmp_path), steps=STEPS, **ONE_RANK)
    done = _train(
        run_file,
        f"training.precision={precision}",
        f"training.evaluate_every_steps={STEPS // 2}",
    )
    assert done.returncode == 0, done.stderr
    steps = read_steps(tmp_path / "run" / "metrics.jsonl")
    assert list(steps) == list(range(1, STEPS + 1))
    assert steps[1]["loss_nats"] == pytest.approx(math.log(VOCAB), rel=0.1)
    assert steps[STEPS]["loss_nats"] < 0.6 * steps[1]["loss_nats"]
    # the ramp: 4 rows of 64 tokens until 1,024 tokens are consumed, 8 after
    assert [steps[step]["consumed_samples"] for step in (1, 4, 5, 6)] == [4, 16, 24, 32]
    expected = {
        "auxiliary_loss",
        "grad_norm",
        "tokens_per_s",
        "model_tflops_per_s",
        "step_time_s",
        "dropped_share",
    }
    assert expected <= steps[STEPS].keys()
    assert "mfu" not in steps[STEPS], "the peak of a CPU is not known"
    evaluations = read_steps(tmp_path / "run" / "metrics.jsonl", kind="evaluation")
    assert list(evaluations) == [STEPS // 2, STEPS]
    assert evaluations[STEPS]["held_out_loss_nats"] < evaluations[STEPS // 2]["held_out_loss_nats"]
    assert f"held-out loss {evaluations[STEPS]['held_out_loss_nats']:.3f}" in done.stderr


def test_resuming_with_other_data_is_refused_and_a_fresh_start_keeps_the_old_run(tmp_path: Path) -> None:
    write_shards(tmp_path)
    run_file = write_run_file(tmp_path / "run", data_in(tmp_path), steps=2, **ONE_RANK)
    assert _train(run_file).returncode == 0
    other = _train(run_file, "seed=7")
    assert other.returncode == 2
    assert "the data's seed is 7 but the checkpoint in" in other.stderr
    assert "set seed back, or start anew with --fresh" in other.stderr
    assert "Traceback" not in other.stderr
    fresh = _train(run_file, "seed=7", "--fresh")
    assert fresh.returncode == 0, fresh.stderr
    [aside] = tmp_path.glob("run.before-*")
    assert (aside / "checkpoints" / "step_00000002" / "manifest.json").is_file()


def test_under_torchrun_dp_grows_to_the_world_and_the_losses_stay(tmp_path: Path) -> None:
    write_shards(tmp_path)
    alone, grown = (
        write_run_file(tmp_path / name, data_in(tmp_path), steps=4, **ONE_RANK)
        for name in ("alone", "torchrun")
    )
    assert lives.start(alone).wait(300) == 0
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2"]
    command = [sys.executable, "-W", "ignore", *launcher, "-m", "megatron_m1", "train", str(grown)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    checkpoints = [run_file.with_suffix("") / "checkpoints" / "step_00000004" for run_file in (alone, grown)]
    losses = [
        [values["loss_nats"] for values in read_steps(tmp_path / name / "metrics.jsonl").values()]
        for name in ("alone", "torchrun")
    ]
    assert len(losses[0]) == 4
    assert [read_manifest(path).layout["dp"] for path in checkpoints] == [1, 2]
    assert losses[1] == pytest.approx(losses[0], rel=10 * tolerances.LOSS)
