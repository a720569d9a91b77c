"""What tracking refuses, describes and computes without any server."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_m1.training import mlflow_sink
from megatron_m1.training.mlflow_run import RunPosition
from megatron_m1.training.spool import RECORD_FILE_NAME
from megatron_m1.training.tracking import (
    POSITION_FILE_NAME,
    TrackingConfig,
    flatten,
    provenance_tags,
    replay,
)

ROOT = Path(__file__).parents[2]


def test_pauses_grow_while_the_server_is_away_and_end_with_its_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    position = RunPosition(tmp_path / POSITION_FILE_NAME, "http://127.0.0.1:9")
    sink = mlflow_sink.MlflowSink(tmp_path / RECORD_FILE_NAME, position, "any", None)
    monkeypatch.setattr(mlflow_sink.time, "monotonic", lambda: 1000.0)
    pauses_s = []
    for _ in range(8):
        sink._pause(ConnectionError("refused"))
        pauses_s.append(sink._next_attempt_s - 1000.0)
    assert pauses_s == [2, 4, 8, 16, 32, 60, 60, 60]
    sink._resume()
    assert sink._next_attempt_s == 0.0


def test_importing_the_trainer_side_does_not_import_mlflow() -> None:
    program = "import sys, megatron_m1.training.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=120, check=False).returncode == 0


def test_replay_of_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no metrics\.jsonl: replay needs"):
        replay(TrackingConfig(), tmp_path, 1.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"uri": "file:runs"}, "not a server or a database that MLflow 3 writes to"),
        ({"uri": "./mlruns"}, "write sqlite:///path/mlflow.db"),
        ({"experiment": " "}, "is empty"),
        ({"system_metrics_interval_s": 0.0}, "set system_metrics=false"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrackingConfig(**fields)


def test_parameters_are_flattened_to_dotted_text() -> None:
    nested = {"name": "a", "layout": {"tp": 2, "pp": None}, "data": {"weights": [0.5, 0.5], "empty": {}}}
    assert flatten(nested) == {
        "name": "a", "layout.tp": "2", "layout.pp": "null", "data.weights": "[0.5, 0.5]", "data.empty": "{}",
    }  # fmt: skip


def test_provenance_names_versions_and_commit() -> None:
    tags = provenance_tags()
    assert tags["torch_version"].startswith("2.")
    if (ROOT / ".git").exists():
        head = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        assert tags["git_commit"] == head.stdout.strip()
