"""A real MLflow server gets every number once, whatever happens to it or to the trainer, and no step waits for it."""

import json
import math
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_m1.training import mlflow_run, mlflow_sink
from megatron_m1.training.metrics import StepMetrics
from megatron_m1.training.mlflow_run import MlflowRun
from megatron_m1.training.spool import RECORD_FILE_NAME, read_steps
from megatron_m1.training.tracking import (
    POSITION_FILE_NAME,
    RunDescription,
    Tracking,
    TrackingConfig,
    open_command,
    replay,
)
from tests.training.mlflow_server import MlflowServer

ROOT = Path(__file__).parents[2]
CLOSE_TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    running = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    running.start()
    yield running
    running.kill()


@pytest.fixture(autouse=True)
def short_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_sink, "_TICK_S", 0.05)


@pytest.fixture
def config(server: MlflowServer, request: pytest.FixtureRequest) -> TrackingConfig:
    return TrackingConfig(uri=server.uri, experiment=request.node.name, system_metrics=False)


def step_metrics(step: int, loss_nats: float | None = None, **extra: float) -> StepMetrics:
    return StepMetrics(
        step=step, loss_nats=1 / step if loss_nats is None else loss_nats, learning_rate=1e-3 * step,
        consumed_samples=8 * step, consumed_tokens=800 * step, step_time_s=time.perf_counter(),
        tokens_per_s=time.perf_counter(), sample_ids_hash="abc", extra=extra,
    )  # fmt: skip


def track(
    config: TrackingConfig, directory: Path, resume_from_step: int | None = None, **described: Any
) -> Tracking:
    return Tracking(
        config, directory, RunDescription(name="run", **described), resume_from_step=resume_from_step
    )


@contextmanager
def a_life(
    config: TrackingConfig, directory: Path, resume_from_step: int | None = None, **described: Any
) -> Iterator[Tracking]:
    """A life that is closed with the patience a loaded machine needs."""
    tracking = track(config, directory, resume_from_step, **described)
    yield tracking
    tracking.close(timeout_s=CLOSE_TIMEOUT_S)


def log_steps(tracking: Tracking, steps: range) -> None:
    for step in steps:
        tracking.log_step(step_metrics(step))


def client_of(config: TrackingConfig) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=config.uri)


def runs_of(config: TrackingConfig) -> list[Any]:
    client = client_of(config)
    experiment = client.get_experiment_by_name(config.experiment)
    return [] if experiment is None else list(client.search_runs([experiment.experiment_id]))


def history_of(
    config: TrackingConfig, run_id: str | None, name: str = "loss_nats"
) -> list[tuple[int, float]]:
    assert run_id is not None
    return [(point.step, point.value) for point in client_of(config).get_metric_history(run_id, name)]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + CLOSE_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {CLOSE_TIMEOUT_S} s in vain for {what}"
        time.sleep(0.05)


def no_sink_is_alive() -> bool:
    return not any(thread.name == "mlflow-sink" for thread in threading.enumerate())


def assert_history_is_the_record(config: TrackingConfig, directory: Path, run_id: str | None) -> None:
    record = read_steps(directory / RECORD_FILE_NAME)
    assert record
    for name in ("loss_nats", "learning_rate", "step_time_s", "consumed_tokens"):
        expected = [(step, float(values[name])) for step, values in sorted(record.items())]
        assert sorted(history_of(config, run_id, name)) == expected, name
    # The timestamp is that of the record, not of the sending: what is sent twice is the same point.
    sent_ms = {
        point.step: point.timestamp for point in client_of(config).get_metric_history(run_id, "loss_nats")
    }
    assert sent_ms == {step: values["time_ms"] for step, values in record.items()}


def test_a_server_killed_in_mid_run_and_back_has_the_complete_history(
    server: MlflowServer, config: TrackingConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracking = track(config, tmp_path)
    log_steps(tracking, range(1, 31))
    wait_for(lambda: len(history_of(config, tracking.run_id)) == 30 if tracking.run_id else False, "30 steps")
    server.kill()
    log_steps(tracking, range(31, 61))
    wait_for(lambda: "does not answer" in caplog.text, "the sink to notice")
    log_steps(tracking, range(61, 91))
    server.start()
    log_steps(tracking, range(91, 101))
    tracking.close(timeout_s=CLOSE_TIMEOUT_S)
    assert_history_is_the_record(config, tmp_path, tracking.run_id)
    (run,) = runs_of(config)
    assert run.info.status == "FINISHED"


def test_no_call_waits_for_a_frozen_server(
    server: MlflowServer, config: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A call that waits for this server now waits for ever, and not for ten seconds that a test could miss.
    monkeypatch.setitem(mlflow_run._CLIENT_ENVIRONMENT, "MLFLOW_HTTP_REQUEST_TIMEOUT", "100000")
    lives: list[Tracking] = []

    def train() -> None:
        lives.append(track(config, tmp_path))
        log_steps(lives[0], range(1, 301))
        lives[0].log_evaluation(300, {"held_out_loss_nats": 0.5})
        lives[0].sync()

    server.stop()
    try:
        wait_for(server.is_stopped, "the server to freeze")
        trainer = threading.Thread(target=train, daemon=True)
        trainer.start()
        trainer.join(CLOSE_TIMEOUT_S)
        assert not trainer.is_alive(), "a call waits for the server"
        # Every call has returned, and the server was frozen all the while.
        assert server.is_stopped()
        assert lives[0].run_id is None
        lives[0].close(timeout_s=0.5)
        assert server.is_stopped()
    finally:
        server.resume()
    wait_for(no_sink_is_alive, "the end of the abandoned sink")
    assert len(read_steps(tmp_path / RECORD_FILE_NAME)) == 300
    assert replay(config, tmp_path, CLOSE_TIMEOUT_S)
    (run,) = runs_of(config)
    assert_history_is_the_record(config, tmp_path, run.info.run_id)
    assert history_of(config, run.info.run_id, "held_out_loss_nats") == [(300, 0.5)]


def test_a_run_that_never_met_its_server_is_replayed_whole(config: TrackingConfig, tmp_path: Path) -> None:
    run_file = tmp_path / "resolved.yaml"
    run_file.write_text("steps: 40\n")
    # Port 9 is the discard service, which is off everywhere: the connection is refused.
    unreachable = TrackingConfig(uri="http://127.0.0.1:9", experiment=config.experiment, system_metrics=False)
    tracking = track(
        unreachable, tmp_path, parameters={"layout": {"tp": 2}}, tags={"layout": "tp2"}, run_file=run_file
    )
    log_steps(tracking, range(1, 41))
    tracking.close(timeout_s=1.0)
    assert tracking.run_id is None
    assert replay(config, tmp_path, CLOSE_TIMEOUT_S)
    (run,) = runs_of(config)
    assert_history_is_the_record(config, tmp_path, run.info.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"layout.tp": "2"}
    assert run.data.tags["layout"] == "tp2"
    assert [file.path for file in client_of(config).list_artifacts(run.info.run_id)] == ["resolved.yaml"]


def killed_life(
    config: TrackingConfig, directory: Path, resume_from_step: int | None, last_step: int
) -> None:
    """A life in a process of its own that logs up to a step and dies by SIGKILL at once."""
    program = textwrap.dedent(
        f"""
        import json, os, signal, time
        from pathlib import Path
        from megatron_m1.training.metrics import StepMetrics
        from megatron_m1.training.tracking import RunDescription, Tracking, TrackingConfig
        config = TrackingConfig(uri={config.uri!r}, experiment={config.experiment!r}, system_metrics=False)
        directory = Path({str(directory)!r})
        described = RunDescription(name="run")
        tracking = Tracking(config, directory, described, resume_from_step={resume_from_step})
        def sent_offset():
            return json.loads((directory / "mlflow_position.json").read_text())["sent_offset"]
        for step in range({resume_from_step or 0} + 1, {last_step} + 1):
            tracking.log_step(StepMetrics(
                step=step, loss_nats=1 / step, learning_rate=1e-3 * step, consumed_samples=8 * step,
                consumed_tokens=800 * step, step_time_s=time.perf_counter(), tokens_per_s=1.0,
            ))
            if step == {last_step} - 10:
                while sent_offset() < (directory / "metrics.jsonl").stat().st_size:
                    time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL


def test_a_killed_trainer_continues_its_run_and_repeated_steps_stand_once(
    config: TrackingConfig, tmp_path: Path
) -> None:
    killed_life(config, tmp_path, None, last_step=50)
    (run,) = runs_of(config)
    assert run.info.status == "RUNNING"
    # Steps 31 to 40 are on the server, 41 to 50 only in the record; the checkpoint is at 30.
    tracking = track(config, tmp_path, resume_from_step=30)
    log_steps(tracking, range(31, 61))
    tracking.close(timeout_s=CLOSE_TIMEOUT_S)
    (run,) = runs_of(config)
    assert run.info.run_id == tracking.run_id
    assert sorted(history_of(config, tracking.run_id)) == [(step, 1 / step) for step in range(1, 61)]
    assert (run.data.tags["resume_from_step"], run.data.tags["life"]) == ("30", "1")
    assert "rewritten_steps" not in run.data.tags


def test_another_history_after_a_resume_is_sent_and_tagged(config: TrackingConfig, tmp_path: Path) -> None:
    with a_life(config, tmp_path) as tracking:
        log_steps(tracking, range(1, 11))
    with a_life(config, tmp_path, resume_from_step=5) as tracking:
        for step in range(6, 13):
            tracking.log_step(step_metrics(step, loss_nats=1 / step if step < 8 else 9.0))
    (run,) = runs_of(config)
    assert run.data.tags["rewritten_steps"] == "8-10"
    losses = sorted(history_of(config, tracking.run_id))
    assert losses == sorted(
        [(step, 1 / step) for step in range(1, 11)] + [(step, 9.0) for step in range(8, 13)]
    )


def test_a_lost_position_repeats_every_call_and_doubles_no_point(
    config: TrackingConfig, tmp_path: Path
) -> None:
    with a_life(config, tmp_path) as tracking:
        log_steps(tracking, range(1, 21))
        tracking.log_step(step_metrics(21, loss_nats=math.nan))
    saved = json.loads((tmp_path / POSITION_FILE_NAME).read_text())
    for lost in ({"sent_offset": 0}, {"sent_offset": 0, "run_id": None}):
        (tmp_path / POSITION_FILE_NAME).write_text(json.dumps(saved | lost))
        assert replay(config, tmp_path, CLOSE_TIMEOUT_S)
    (run,) = runs_of(config)
    history = history_of(config, run.info.run_id)
    assert [step for step, _ in history] == list(range(1, 22))
    assert math.isnan(history[-1][1])
    assert len(history_of(config, run.info.run_id, "step_time_s")) == 21


def test_points_with_the_same_timestamp_are_kept_once_by_the_server(
    config: TrackingConfig, tmp_path: Path
) -> None:
    """What exactly-once rests on when an answer is lost: a repeated call changes nothing."""
    from mlflow.entities import Metric

    with a_life(config, tmp_path) as tracking:
        pass
    client = client_of(config)
    points = [Metric("a", 0.1 * step, 1_700_000_000_000 + step, step) for step in range(1000)]
    for _ in range(2):
        client.log_batch(tracking.run_id, metrics=points)
    client.log_batch(tracking.run_id, metrics=points[500:] + [Metric("a", 7.0, 1, 1000)])
    assert len(history_of(config, tracking.run_id, "a")) == 1001


def test_a_deleted_run_is_replaced_by_one_with_the_whole_history(
    config: TrackingConfig, tmp_path: Path
) -> None:
    tracking = track(config, tmp_path)
    log_steps(tracking, range(1, 11))
    wait_for(lambda: len(history_of(config, tracking.run_id)) == 10 if tracking.run_id else False, "10 steps")
    deleted = tracking.run_id
    client_of(config).delete_run(deleted)
    log_steps(tracking, range(11, 21))
    wait_for(lambda: tracking.run_id not in (None, deleted), "a new run")
    tracking.close(timeout_s=CLOSE_TIMEOUT_S)
    assert_history_is_the_record(config, tmp_path, tracking.run_id)


def test_a_fresh_start_in_a_used_directory_is_a_new_run(config: TrackingConfig, tmp_path: Path) -> None:
    with a_life(config, tmp_path) as first:
        log_steps(first, range(1, 11))
    with a_life(config, tmp_path) as second:
        log_steps(second, range(1, 4))
    assert len(runs_of(config)) == 2
    assert len(history_of(config, first.run_id)) == 10
    assert len(history_of(config, second.run_id)) == 3


def test_the_run_id_of_a_checkpoint_continues_the_run_from_another_directory(
    config: TrackingConfig, tmp_path: Path
) -> None:
    with a_life(config, tmp_path / "first") as first:
        log_steps(first, range(1, 11))
    description = RunDescription(name="run")
    with Tracking(
        config, tmp_path / "second", description, resume_from_step=8, run_id=first.run_id
    ) as second:
        log_steps(second, range(9, 13))
    assert second.run_id == first.run_id
    assert [step for step, _ in history_of(config, first.run_id)] == list(range(1, 13))


def test_parameters_changed_by_a_resume_become_a_tag(config: TrackingConfig, tmp_path: Path) -> None:
    with a_life(config, tmp_path, parameters={"training": {"steps": 5, "seed": 1}}):
        pass
    with a_life(config, tmp_path, 0, parameters={"training": {"steps": 9, "seed": 1, "new": [1, 2]}}):
        pass
    (run,) = runs_of(config)
    assert run.data.params == {"training.steps": "5", "training.seed": "1", "training.new": "[1, 2]"}
    assert json.loads(run.data.tags["changed_parameters.life_1"]) == {"training.steps": ["5", "9"]}


def test_a_point_the_server_refuses_costs_only_itself(
    config: TrackingConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with a_life(config, tmp_path) as tracking:
        for step in range(1, 31):
            tracking.log_step(step_metrics(step, **({"bad?name": 1.0} if step == 17 else {})))
    assert_history_is_the_record(config, tmp_path, tracking.run_id)
    (run,) = runs_of(config)
    assert run.data.tags["num_refused_points"] == "1"
    assert "refuses metric 'bad?name' of step 17" in caplog.text


def test_a_line_longer_than_one_call_arrives_whole(config: TrackingConfig, tmp_path: Path) -> None:
    with a_life(config, tmp_path) as tracking:
        for step in (1, 2):
            tracking.log_step(
                step_metrics(step, **{f"load/expert_{index}": float(index) for index in range(2560)})
            )
    for name in ("loss_nats", "load/expert_0", "load/expert_2559"):
        assert [step for step, _ in history_of(config, tracking.run_id, name)] == [1, 2], name


def test_a_long_line_cut_by_a_crash_is_sent_again_and_not_taken_for_whole(
    config: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = {f"load/expert_{index}": float(index) for index in range(2560)}
    send_call = MlflowRun._send_call
    calls: list[int] = []

    def send_one_call_only(run: MlflowRun, points: Any) -> int:
        calls.append(len(points))
        if len(calls) > 1:
            raise ConnectionError("cut")
        return send_call(run, points)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowRun, "_send_call", send_one_call_only)
        tracking = track(config, tmp_path)
        tracking.log_step(step_metrics(1, **line))
        wait_for(lambda: len(calls) > 1, "the cut")
        tracking.close(timeout_s=0.0)
        wait_for(no_sink_is_alive, "the end")
    with a_life(config, tmp_path, resume_from_step=0) as tracking:
        tracking.log_step(step_metrics(1, **line))
    for name in ("loss_nats", "load/expert_2559"):
        assert [step for step, _ in history_of(config, tracking.run_id, name)] == [1], name


def test_an_end_that_the_server_did_not_hear_is_told_by_replay(
    config: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(run: MlflowRun, status: str) -> None:
        raise ConnectionError("lost")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowRun, "end", lose)
        tracking = track(config, tmp_path)
        log_steps(tracking, range(1, 4))
        wait_for(lambda: tracking.run_id is not None, "the run")
        tracking.close(timeout_s=1.0)
        wait_for(no_sink_is_alive, "the end")
    assert runs_of(config)[0].info.status == "RUNNING"
    assert replay(config, tmp_path, CLOSE_TIMEOUT_S)
    assert runs_of(config)[0].info.status == "FINISHED"
    assert_history_is_the_record(config, tmp_path, tracking.run_id)


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_the_way_a_life_ends_is_the_status_of_the_run(
    config: TrackingConfig, tmp_path: Path, error: type[BaseException] | None, status: str
) -> None:
    def live() -> None:
        with track(config, tmp_path) as tracking:
            log_steps(tracking, range(1, 3))
            if error is not None:
                raise error

    if error is None:
        live()
    else:
        with pytest.raises(error):
            live()
    wait_for(lambda: [run.info.status for run in runs_of(config)] == [status], status)
    with a_life(config, tmp_path, resume_from_step=2) as tracking:
        wait_for(
            lambda: tracking.run_id is not None and runs_of(config)[0].info.status == "RUNNING", "RUNNING"
        )


def test_system_metrics_come_with_the_steps(
    server: MlflowServer, config: TrackingConfig, tmp_path: Path
) -> None:
    sampled = TrackingConfig(uri=server.uri, experiment=config.experiment, system_metrics_interval_s=0.05)
    tracking = track(sampled, tmp_path)
    step = 0

    def samples_are_recorded() -> bool:
        nonlocal step
        step += 1
        tracking.log_step(step_metrics(step))
        record = read_steps(tmp_path / RECORD_FILE_NAME)
        return sum("system/cpu_utilization_percentage" in values for values in record.values()) >= 3

    wait_for(samples_are_recorded, "three samples")
    tracking.close(timeout_s=CLOSE_TIMEOUT_S)
    steps = [step for step, _ in history_of(config, tracking.run_id, "system/cpu_utilization_percentage")]
    assert len(steps) == len(set(steps)) >= 3
    assert history_of(config, tracking.run_id, "system/system_memory_usage_megabytes")[0][1] > 0


def test_without_psutil_there_is_one_run_without_system_metrics(
    server: MlflowServer, config: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    for module in [name for name in sys.modules if name.startswith("mlflow.system_metrics.metrics")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "psutil", None)
    sampled = TrackingConfig(uri=server.uri, experiment=config.experiment, system_metrics_interval_s=0.05)
    tracking = track(sampled, tmp_path)
    log_steps(tracking, range(1, 11))
    wait_for(lambda: "system metrics are off" in caplog.text, "the warning")
    tracking.close(timeout_s=CLOSE_TIMEOUT_S)
    (run,) = runs_of(config)
    assert run.info.status == "FINISHED"
    assert_history_is_the_record(config, tmp_path, tracking.run_id)


def test_the_default_is_a_database_in_the_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    run_file = tmp_path / "resolved.yaml"
    run_file.write_text("a: 1\n")
    config = TrackingConfig(system_metrics=False)
    tracking = track(config, tmp_path / "run", run_file=run_file)
    log_steps(tracking, range(1, 6))
    tracking.close(timeout_s=CLOSE_TIMEOUT_S)
    uri = f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}"
    assert open_command(config, tmp_path / "run") == f"mlflow ui --backend-store-uri {uri}"
    assert len(history_of(TrackingConfig(uri=uri), tracking.run_id)) == 5
    assert list((tmp_path / "run" / "mlflow_artifacts").rglob("resolved.yaml"))
    assert list(elsewhere.iterdir()) == []


def test_disabled_tracking_still_writes_the_record(tmp_path: Path) -> None:
    with a_life(TrackingConfig(enabled=False), tmp_path) as tracking:
        log_steps(tracking, range(1, 6))
    assert tracking.run_id is None
    assert list(read_steps(tmp_path / RECORD_FILE_NAME)) == [1, 2, 3, 4, 5]
    assert [file.name for file in tmp_path.iterdir()] == [RECORD_FILE_NAME]
