"""Files of a run arrive on a real MLflow server: the pictures of what is measured during and after each stage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.synthetic import make_problem
from data_pipeline.tokenize import train_byte_level_bpe
from megatron_m1.training import mlflow_sink
from megatron_m1.training.mlflow_run import MlflowRun
from megatron_m1.training.tracking import RunDescription, Tracking, TrackingConfig
from tests.training import lives
from tests.training.mlflow_server import MlflowServer

RUN = """
name: recorded
run_dir: {run_dir}
model:
  {{num_layers: 2, softmax_every: 2, hidden_size: 32, num_heads: 2, num_kv_heads: 2, head_dim: 16, rotary_dim: 8,
    num_experts: 2, ffn_size: 32, vocab_size: 400}}
layout: {{}}
data:
  sources: [{{kind: synthetic, task: needle}}]
  held_out: [{{name: held out, kind: synthetic, task: needle}}]
  tokenizer_path: {tokenizer}
training: {{micro_batch_size: 1, precision: fp32, evaluation_rows: 2}}
checkpoint: {{every_steps: 1}}
tracking: {{uri: "{uri}", experiment: long context, system_metrics: false}}
long_context:
  {{needle_lengths: [256, 512], needle_depths: 2, needle_trials: 1, multi_needles: 2, position_rows: 2, every_steps: 2}}
stages:
  - name: short
    training: {{steps: 3, sequence_length: 256}}
    schedule: {{batch_ramp: [{{from_tokens: 0, global_batch_tokens: 256}}]}}
  - name: long
    training: {{steps: 2, sequence_length: 512}}
    schedule: {{batch_ramp: [{{from_tokens: 0, global_batch_tokens: 512}}]}}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    running = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    running.start()
    yield running
    running.kill()


@pytest.mark.multiprocess
def test_pictures_and_numbers_of_every_stage_are_on_the_server(server: MlflowServer, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    texts = (make_problem(task, 1, i, 60).text for task in ("needle", "needles") for i in range(40))
    train_byte_level_bpe(texts, 400, tokenizer)
    run_file = tmp_path / "recorded.yaml"
    run_file.write_text(RUN.format(run_dir=tmp_path / "run", tokenizer=tokenizer, uri=server.uri))
    # killed and queued again, it is still one run of the server
    first = lives.start(run_file)
    lives.wait_for_step(tmp_path / "run", first, 3)
    lives.kill(first)
    assert lives.start(run_file).wait(300) == 0
    assert len(lives.steps_by_life(tmp_path / "run")) == 2
    client, run_id = _run_on(server, "long context")
    stored = {file.path for file in client.list_artifacts(run_id, "pictures")}
    # within the first stage and at its end; the second stage counts on
    assert stored == {
        f"pictures/{name}-step_{step:08d}.{ending}"
        for name in ("needles", "multi_needles", "positions")
        for step in (2, 3, 4, 5)
        for ending in ("png", "json")
    }
    for path in stored:
        there = Path(client.download_artifacts(run_id, path, str(tmp_path)))
        assert there.read_bytes() == (tmp_path / "run" / path).read_bytes()
    grid = json.loads((tmp_path / "run" / "pictures" / "multi_needles-step_00000005.json").read_text())
    assert (grid["lengths"], grid["depths"]) == ([256, 512], [0.0, 1.0])
    for name in ("needles_found_512", "multi_needles_found_256", "loss_at_longest_positions_nats"):
        assert {point.step for point in client.get_metric_history(run_id, name)} == {2, 3, 4, 5}, name
    assert {point.step for point in client.get_metric_history(run_id, "loss_nats")} == {1, 2, 3, 4, 5}


def _run_on(server: MlflowServer, experiment: str) -> tuple[Any, str]:
    """A client of the server, and the only run of an experiment."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=server.uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None, experiment
    (run,) = client.search_runs([found.experiment_id])
    return client, run.info.run_id


@contextmanager
def _a_life(server: MlflowServer, directory: Path) -> Iterator[Tracking]:
    config = TrackingConfig(uri=server.uri, experiment=directory.name, system_metrics=False)
    tracking = Tracking(config, directory, RunDescription(name="run"))
    yield tracking
    # the patience a loaded machine needs
    tracking.close(timeout_s=120.0)


def test_files_arrive_in_their_folder_and_a_missing_one_keeps_nothing_waiting(
    server: MlflowServer, tmp_path: Path
) -> None:
    (tmp_path / "pictures").mkdir()
    with _a_life(server, tmp_path) as tracking:
        for step, name in enumerate(("a.png", "b.png", "gone.png"), 1):
            (tmp_path / "pictures" / name).write_text(name)
            tracking.log_evaluation(step, {"found": step / 4})
            tracking.log_file(step, tmp_path / "pictures" / name)
            (tmp_path / "pictures" / "gone.png").unlink(missing_ok=True)
        tracking.log_evaluation(4, {"found": 1.0})
    client, run_id = _run_on(server, tmp_path.name)
    stored = {file.path for file in client.list_artifacts(run_id, "pictures")}
    assert stored == {"pictures/a.png", "pictures/b.png"}
    there = Path(client.download_artifacts(run_id, "pictures/b.png", str(tmp_path)))
    assert there.read_text() == "b.png"
    assert [point.value for point in client.get_metric_history(run_id, "found")] == [0.25, 0.5, 0.75, 1.0]


def test_a_server_that_cannot_store_files_gets_every_number(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Path] = []

    def refuse(_run: MlflowRun, file: Path, folder: str | None = None) -> None:
        tried.append(file)
        raise OSError("no artifact store")

    monkeypatch.setattr(mlflow_sink, "_TICK_S", 0.05)
    monkeypatch.setattr(MlflowRun, "upload", refuse)
    (tmp_path / "a.png").write_bytes(b"one")
    with _a_life(server, tmp_path) as tracking:
        tracking.log_evaluation(1, {"found": 0.5})
        tracking.log_file(1, tmp_path / "a.png")
        tracking.log_evaluation(2, {"found": 1.0})
    client, run_id = _run_on(server, tmp_path.name)
    assert [point.value for point in client.get_metric_history(run_id, "found")] == [0.5, 1.0]
    assert len(tried) == mlflow_sink._FILE_ATTEMPTS
