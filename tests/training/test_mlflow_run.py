"""A local MLflow database is whole or absent, whenever its creator dies."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_m1.training.mlflow_run import MlflowRun, RunPosition
from tests.spawn import ROOT

_CREATE = """
import sys
from pathlib import Path
from megatron_m1.training.mlflow_run import MlflowRun, RunPosition
directory = Path(sys.argv[1])
MlflowRun(RunPosition(directory / "position.json", f"sqlite:///{directory / 'mlflow.db'}"), "experiment")
"""


def test_a_creation_killed_in_the_middle_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    creator = subprocess.Popen([sys.executable, "-W", "ignore", "-c", _CREATE, str(tmp_path)], cwd=ROOT)
    deadline = time.monotonic() + 120
    # a journal comes with every transaction of the creation and goes with its end
    while not list(tmp_path.glob("mlflow.db.unfinished-*-journal")):
        assert creator.poll() is None, "the database was created before its creation was seen"
        assert time.monotonic() < deadline
    creator.send_signal(signal.SIGKILL)
    creator.wait()
    assert not (tmp_path / "mlflow.db").exists()
    position = RunPosition(tmp_path / "position.json", f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = MlflowRun(position, "experiment")
    run.open({"run_name": "second life", "parameters": {}, "tags": {}, "run_file": None, "life": 1})
    assert run.send([("loss_nats", 1.5, 1, 1)]) == 0
    assert run.held_values("loss_nats", 1) == {"1.5"}
    assert not list(tmp_path.glob("mlflow.db.unfinished-*"))
