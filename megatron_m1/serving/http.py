"""The HTTP side of `m1 serve`: a thread per connection reads a request, waits at the desk, and writes the answer.

    GET  /v1/models, /health
    POST /v1/completions, /v1/chat/completions       OpenAI's; `stream` sends each choice whole, in one event
    POST /update_weights_from_disk                   {"model_path": checkpoint directory}, as SGLang's
Loopback by default: there is no authentication here. The standard library's server is used, so that serving needs no
package that training does not.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_m1.serving.desk import Busy, Closed, Desk
from megatron_m1.serving.model import ServedModel
from megatron_m1.serving.protocol import BadRequest, answer, as_stream, read_chat, read_completion
from parallel.manifest import CheckpointError

_LOG = logging.getLogger(__name__)
MOST_BODY_BYTES = 64 << 20
LOOPBACK = ("127.0.0.1", "::1", "localhost")
_STEP_NAME = re.compile(r"step_(\d{8,})")
_READERS = {"/v1/completions": read_completion, "/v1/chat/completions": read_chat}


class _Listener(ThreadingHTTPServer):
    """A thread per connection; one that comes in a burst of hundreds waits for its thread and is not turned away."""

    # the default of 5 makes the sixth of a burst try again seconds later, and resets some
    request_queue_size = 1024
    daemon_threads = True


class Server:
    """Serves from `__enter__` to `__exit__`, on rank 0.

    Args:
        model: what is served; only its settings are read here.
        desk: where requests wait.
        name: of the model.
        host: to listen on.
        port: 0 takes any free one.

    Raises:
        ValueError: the port is taken, or the host is not of this machine.
    """

    def __init__(self, model: ServedModel, desk: Desk, name: str, host: str, port: int) -> None:
        self.model, self.desk, self.name = model, desk, name
        try:
            self._http = _Listener((host, port), type("Handler", (_Handler,), {"m1": self}))
        except OSError as error:
            raise ValueError(
                f"--host {host} --port {port} cannot be listened on ({error}): the port must be free and the host an "
                "address of this machine; choose another port, or 0 for any"
            ) from error
        self.url = f"http://{host}:{self._http.server_address[1]}/v1"

    def models(self) -> dict[str, Any]:
        """The body of GET /v1/models."""
        return {
            "object": "list",
            "data": [
                {
                    "id": self.name,
                    "object": "model",
                    "owned_by": "m1",
                    "max_model_len": self.model.limits.window,
                    "weights_step": self.model.step,
                }
            ],
        }

    def complete(self, path: str, body: Any) -> tuple[dict[str, Any], bool]:
        """The answer to a POST of one of the two completions, and whether it is to be streamed."""
        asked = body.get("model") if isinstance(body, dict) else None
        if asked not in (None, self.name):
            raise KeyError(f"there is no model {asked!r}: this server has {self.name!r}")
        coder = self.model.coder
        question = _READERS[path](body, coder, self.model.limits)
        samples, step = self.desk.ask(question)
        return answer(question, samples, self.name, step, coder.text), question.streams

    def load(self, body: Any) -> dict[str, Any]:
        """The answer to POST /update_weights_from_disk."""
        path = Path(str(body.get("model_path", ""))) if isinstance(body, dict) else Path()
        named = _STEP_NAME.fullmatch(path.name)
        if named is None or not path.is_dir():
            raise BadRequest(
                f"model_path={str(path)!r} is no checkpoint: allowed is a directory step_NNNNNNNN as `m1 train` writes "
                "it, seen from this server; name one"
            )
        try:
            step, seconds = self.desk.load(path.parent, int(named[1]))
        except (ValueError, CheckpointError) as error:
            raise BadRequest(str(error)) from error
        return {"success": True, "message": f"step {step} in {seconds:.2f} s", "weights_step": step}

    def __enter__(self) -> Server:
        threading.Thread(target=self._http.serve_forever, args=(0.1,), name="http", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = 600
    m1: Server
    """Set in the class of each server."""

    def log_message(self, format: str, *arguments: Any) -> None:
        _LOG.debug(format, *arguments)

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._send(200, self.m1.models())
        elif self.path == "/health":
            self._send(200, {})
        else:
            self._refuse(404, f"there is no {self.path}")

    def do_POST(self) -> None:
        if self.path not in (*_READERS, "/update_weights_from_disk"):
            # the body stays unread, so the connection cannot go on
            self.close_connection = True
            self._refuse(404, f"there is no {self.path}")
            return
        try:
            body = self._body()
            if self.path == "/update_weights_from_disk":
                self._send(200, self.m1.load(body))
                return
            whole, streams = self.m1.complete(self.path, body)
            self._stream(whole) if streams else self._send(200, whole)
        except KeyError as error:
            self._refuse(404, error.args[0])
        except ValueError as error:
            self._refuse(400, str(error))
        except (Busy, Closed) as error:
            self._refuse(503, str(error))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _body(self) -> Any:
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        if not 0 <= length <= MOST_BODY_BYTES:
            self.close_connection = True
            raise BadRequest(
                f"the body has Content-Length {self.headers.get('Content-Length')}: allowed are 0 to "
                f"{MOST_BODY_BYTES} bytes"
            )
        content = self.rfile.read(length)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the body is no JSON: {error}") from error

    def _stream(self, whole: dict[str, Any]) -> None:
        lines = [f"data: {json.dumps(event)}\n\n" for event in as_stream(whole)]
        content = "".join([*lines, "data: [DONE]\n\n"]).encode()
        self._write(200, content, "text/event-stream")

    def _refuse(self, status: int, message: str) -> None:
        kind = "invalid_request_error" if status < 500 else "server_error"
        self._send(status, {"error": {"message": message, "type": kind, "code": status}})

    def _send(self, status: int, body: dict[str, Any]) -> None:
        self._write(status, json.dumps(body).encode(), "application/json")

    def _write(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
