"""A real MLflow server on loopback that tests may stop, kill and start again on the same port and "
"database."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

START_TIMEOUT_S = 180.0


class MlflowServer:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and wait until it is healthy."""
        environment = dict(
            os.environ, MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"
        )
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port),
            "--backend-store-uri", f"sqlite:///{self._directory / 'server.db'}", "--workers", "1",
            "--artifacts-destination", str(self._directory / "artifacts"),
        ]  # fmt: skip
        with (self._directory / "server.log").open("ab") as log:
            # A session of its own, so that its worker processes are stopped and killed with it.
            self._process = subprocess.Popen(
                command, env=environment, cwd=self._directory, stdout=log, stderr=log, start_new_session=True
            )
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._is_healthy():
            exit_code = self._process.poll()
            log_text = (self._directory / "server.log").read_text()[-2000:]
            assert exit_code is None, f"the MLflow server ended with {exit_code}: {log_text}"
            assert time.monotonic() < deadline_s, f"the MLflow server is not healthy: {log_text}"
            time.sleep(0.2)

    def stop(self) -> None:
        """Freeze it: connections are still accepted by the kernel, no answer comes."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `stop`."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill it with its workers."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def is_stopped(self) -> bool:
        """Whether every process of the server is frozen."""
        assert self._process is not None, "the server was killed"
        states = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = status.read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == self._process.pid:
                states.append(fields[0])
        return bool(states) and set(states) <= {"T", "t"}

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "the server was killed"
        os.killpg(self._process.pid, number)

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False
