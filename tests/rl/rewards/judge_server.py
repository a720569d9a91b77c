"""A small server that speaks the OpenAI chat protocol on loopback and can misbehave in every way a judge does."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Listener(ThreadingHTTPServer):
    # five at once are served by default; a connection more waits a second
    request_queue_size = 128


class JudgeServer:
    """Serves until closed; a context manager.

    The judge grades 5 where the answer holds the reference and 1 elsewhere, and prefers the longer of two answers; it
    takes any weights that are pushed. `faults` are used up one per request, before it behaves, and `always` comes after
    them: a status code, "text", "no choices", "drip", "cut", "rude", "no grade", "always A", or an object, which is
    then the whole answer.
    """

    def __init__(self, faults: list[Any] | None = None, *, always: Any = None) -> None:
        self.faults, self.always = list(faults or []), always
        self.seen: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                server.seen["GET " + self.path] += 1
                self._send(200, json.dumps({"data": [{"id": "judge"}]}))

            def do_POST(self) -> None:
                server.seen["POST " + self.path] += 1
                server.keys.append(self.headers.get("Authorization"))
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.bodies.append(body)
                if self.path == "/update_weights_from_disk":
                    self._send(200, json.dumps({"success": True}))
                    return
                fault = server.faults.pop(0) if server.faults else server.always
                if isinstance(fault, int):
                    self._send(fault, "no")
                elif isinstance(fault, dict):
                    self._send(200, json.dumps(fault))
                elif fault == "text":
                    self._send(200, "this is not JSON")
                elif fault == "no choices":
                    self._send(200, json.dumps({"choices": []}))
                elif fault == "cut":
                    self.close_connection = True
                elif fault == "drip":
                    self._drip()
                else:
                    self._send(200, server._answer(fault, body["messages"][-1]["content"]))

            def _drip(self) -> None:
                self.send_response(200)
                self.end_headers()
                try:
                    for _ in range(200):
                        self.wfile.write(b" ")
                        time.sleep(0.05)
                except OSError:
                    return

            def _send(self, status: int, text: str) -> None:
                content = text.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self._http = _Listener(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def _answer(self, fault: Any, question: str) -> str:
        def part(tag: str) -> str:
            found = re.search(rf"<{tag} (\w+)>\n(.*?)\n</{tag} \1>", question, re.DOTALL)
            return found[2] if found else ""

        if fault == "rude":
            words = "I would rather not. Grade: 11"
        elif fault == "no grade":
            words = "A fine answer."
        elif fault == "always A":
            words = "Better: A"
        elif "<reference " in question:
            words = (
                "It says so.\n**Grade: 5**"
                if part("reference") in part("answer")
                else "It does not.\nGrade: 1"
            )
        else:
            longer = len(part("answer_a")) - len(part("answer_b"))
            words = f"Hm.\nBetter: {'A' if longer > 0 else 'B' if longer < 0 else 'equal'}"
        return json.dumps({"choices": [{"message": {"role": "assistant", "content": words}}]})

    def __enter__(self) -> JudgeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
