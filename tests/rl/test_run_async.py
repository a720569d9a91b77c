"""A run one step off, some samples cut and carried on: what MLflow shows of it, and a kill within it.

Its window grows, and a task that a judge grades is mixed in on the way, so that the state of both crosses checkpoints;
routers take in training the experts of generation.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from megatron_m1.rl.pictures import reward_picture
from megatron_m1.training.spool import read_steps
from parallel.manifest import read_manifest
from tests.rl.rewards.judge_server import JudgeServer
from tests.rl.tiny_rl import SHORT_FIRST, write_short_file, write_tokenizer
from tests.spawn import ROOT
from tests.training import lives

pytestmark = pytest.mark.multiprocess

RL_STEPS = 8
STEPS = SHORT_FIRST + RL_STEPS
NUM_COPY = 12
# what the loop must show of every generation batch, by the name a user looks for
METRICS = {
    "reward",
    "reward/copy",
    "pass_rate",
    "pass_rate/general",
    "length_tokens_p1",
    "length_tokens_p50",
    "length_tokens_p99",
    "clipped_share",
    "ratio_p1",
    "ratio_p50",
    "ratio_p99",
    "ppo_dropped_share",
    "low_probability_ppo_dropped_share",
    "entropy_nats",
    "mismatch_correlation",
    "mismatch_nats_p50",
    "mismatch_nats_p99",
    "truncated_share",
    "repetition_share",
    "reward_failures/timeout",
    "samples_carried",
    "samples_restarted",
    "window_tokens",
    "collapse_level",
    "length_alarms",
    "prompts_in_flight",
    "kept_share",
}


@pytest.fixture(scope="module")
def judge() -> Iterator[JudgeServer]:
    """Grades the general task; what it says of a text is always the same."""
    with JudgeServer() as server:
        yield server


def _run_file(run_dir: Path, judge: JudgeServer, **tracking: Any) -> Path:
    """In one process."""
    general = run_dir.with_name("general.jsonl")
    lines = [{"prompt": f"say {number}", "answer": {"reference": "e"}} for number in range(8)]
    general.write_text("".join(json.dumps(line) + "\n" for line in lines))
    end = {"url": judge.url, "model": "judge"}
    rl = {
        "sources": [
            {"name": "copy", "kind": "synthetic", "task": "copy", "length_words": 1, "count": NUM_COPY},
            {"name": "general", "path": str(general), "reward": "grade", "judge": end},
        ],
        "curriculum": {
            "points": [
                {"step": 0, "weights": {"copy": 1.0}},
                {"step": STEPS, "weights": {"copy": 1.0, "general": 1.0}},
            ]
        },
        "rollout": {"slots": 8, "lag_batches": 1, "passes_per_round": 20, "replay_experts": True},
        # both criteria hold as soon as two batches were seen
        "window": {"stages_tokens": [44, 60], "steps": 1, "near": 0.01, "perplexity_change": 100.0},
    }
    return write_short_file(run_dir, {}, RL_STEPS, rl, tracking)


@pytest.fixture(scope="module")
def whole(judge: JudgeServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run directory of an undisturbed run, and what it said; the tokenizer lies beside it."""
    directory = tmp_path_factory.mktemp("async")
    write_tokenizer(directory / "tokenizer.json")
    run_file = _run_file(directory / "whole", judge, enabled=True, system_metrics=False)
    command = [sys.executable, "-W", "ignore", "-m", "megatron_m1", "train", str(run_file)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert judge.seen["POST /v1/chat/completions"] > 0
    return directory / "whole", ended.stderr


def _rl_steps(run_dir: Path) -> dict[int, dict[str, Any]]:
    """The record of the last stage."""
    found = read_steps(run_dir / "metrics.jsonl")
    assert list(found) == list(range(1, STEPS + 1))
    return {step: values for step, values in found.items() if step > SHORT_FIRST}


def test_mlflow_has_every_metric_of_the_loop_and_the_table_of_samples(whole, tmp_path: Path) -> None:
    run_dir, said = whole
    assert "cispo: ratio pi/pi_old in [0, 5], tokens outside are weighted by the bound" in said
    client = MlflowClient(f"sqlite:///{run_dir / 'mlflow.db'}")
    (run,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert set(run.data.metrics) >= METRICS, METRICS - set(run.data.metrics)
    record = _rl_steps(run_dir)
    assert {value.step: value.value for value in client.get_metric_history(run.info.run_id, "reward")} == {
        step: values["reward"] for step, values in record.items() if "reward" in values
    }
    assert sum(values["samples_carried"] for values in record.values()) > 0
    tables = [file.path for file in client.list_artifacts(run.info.run_id, "samples")]
    # of every second batch, under the step that its weights are of
    begins = {values["rl_batch"]: step - 1 for step, values in sorted(record.items(), reverse=True)}
    assert tables == [f"samples/step_{begins[batch]:08d}.json" for batch in sorted(begins)[::2]]
    table = json.loads(Path(client.download_artifacts(run.info.run_id, tables[0], str(tmp_path))).read_text())
    row = dict(zip(table["columns"], table["data"][0], strict=True))
    assert row["task"] == "copy" and row["prompt"] and row["tokens"] > 0
    assert row["finish"] in ("stop", "length", "repetition") and row["reward"] is not None


def test_the_picture_shows_the_first_batch_and_the_end(whole, tmp_path: Path) -> None:
    record = _rl_steps(whole[0])
    scored = [values for values in record.values() if "pass_rate" in values]
    rates = list({values["rl_batch"]: values["pass_rate"] for values in scored}.values())
    first, last = reward_picture(whole[0], tmp_path / "curve.png", width=2)
    assert (first, last) == pytest.approx((rates[0], sum(rates[-2:]) / 2))
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="has no record of reinforcement learning"):
        reward_picture(tmp_path, tmp_path / "none.png")


def test_the_window_grows_and_the_judged_task_is_mixed_in_on_the_way(whole) -> None:
    record = _rl_steps(whole[0])
    windows = [values["window_tokens"] for values in record.values()]
    assert windows == sorted(windows) and set(windows) == {44, 60}, windows
    learnt = [[int(prompt) for prompt in values["prompts"].split()] for values in record.values()]
    judged = [[prompt % (NUM_COPY + 8) >= NUM_COPY for prompt in prompts] for prompts in learnt]
    assert not any(judged[0]) and any(map(any, judged)), judged


@pytest.mark.slow
def test_a_run_one_step_off_that_is_killed_equals_the_undisturbed_one(
    whole, judge: JudgeServer, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((whole[0].parent / "tokenizer.json").read_bytes())
    killed = tmp_path / "killed"
    run_file = _run_file(killed, judge, enabled=False)
    process = lives.start(run_file)
    lives.wait_for_checkpoint(killed, process, random.randint(SHORT_FIRST + 1, STEPS - 4))
    lives.kill(process, after_s=random.uniform(0.0, 0.3))
    assert lives.start(run_file).wait(200) == 0
    began_after, taken = lives.steps_by_life(killed)[-1]
    assert began_after > SHORT_FIRST and taken, (began_after, taken)
    lives.assert_same_run(killed, whole[0], steps=STEPS)
    about = [
        read_manifest(path / "checkpoints" / f"step_{STEPS:08d}").extra["rl"] for path in (killed, whole[0])
    ]
    assert about[0] == about[1]
    learnt = [prompt for values in _rl_steps(killed).values() for prompt in values["prompts"].split()]
    assert len(set(learnt)) == len(learnt) > 0
    in_flight = sum(len(about[0][part]) for part in ("running", "unscored", "ready", "batch"))
    assert in_flight > 0, "nothing was under way across a checkpoint"
    assert sum(about[0]["taken"].values()) == sum(about[0]["fates"].values()) + in_flight
