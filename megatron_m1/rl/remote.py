"""One exchange of JSON with an HTTP server, bounded in time as a whole: judges and remote engines are asked through it.

What a fault means is decided here, once: what may pass and is worth a second attempt, what no attempt changes, and an
answer that is none.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")

MAX_ANSWER_BYTES = 256 << 20
# too many requests, and the server's own troubles: they may pass
PASSING_STATUS = (408, 409, 425, 429, 500, 502, 503, 504)


class RemoteUnavailable(Exception):
    """No connection, no whole answer in time, or a refusal."""


class RemoteRefused(RemoteUnavailable):
    """A refusal that no second attempt changes."""


class RemoteUnreadable(Exception):
    """An answer that is not what was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """Where a server is and how long it is waited for."""

    url: str
    """Base of the interface, such as http://host:8000/v1."""
    key_file: str | None = None
    """File that holds the key; its content is sent as a bearer token. None sends none."""
    request_timeout_s: float = 60.0
    """Wall seconds for one exchange, from connecting to the last byte."""
    max_answer_bytes: int = MAX_ANSWER_BYTES
    """A longer answer is a fault."""

    def exchange(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """Send a body (None: none) to `path` below the base; what comes back, read as JSON. One attempt.

        Raises:
            RemoteUnavailable, RemoteRefused, RemoteUnreadable: as their docstrings say; each names the url.
        """
        status, received = self._send(method, urlsplit(self.url).path.rstrip("/") + path, body)
        if status != 200:
            said = received[:200].decode(errors="replace")
            kind = RemoteUnavailable if status in PASSING_STATUS else RemoteRefused
            raise kind(f"{self.url} refused with status {status}: {said}")
        try:
            return json.loads(received)
        except ValueError as error:
            raise RemoteUnreadable(f"{self.url} sent no JSON: {received[:200]!r}") from error

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        deadline = time.monotonic() + self.request_timeout_s
        # not urllib.request, which would take a proxy from the environment
        connection = kind(parts.hostname or "", parts.port, timeout=self.request_timeout_s)
        headers = {"Content-Type": "application/json"} | self._authorization()
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, body=content, headers=headers)
            response = connection.getresponse()
            return response.status, self._read(connection, response, deadline)
        except (OSError, http.client.HTTPException) as error:
            raise RemoteUnavailable(f"{self.url}: {type(error).__name__}: {error}") from error
        finally:
            connection.close()

    def _authorization(self) -> dict[str, str]:
        if self.key_file is None:
            return {}
        try:
            return {"Authorization": f"Bearer {Path(self.key_file).read_text(encoding='utf-8').strip()}"}
        except (OSError, UnicodeDecodeError) as error:
            raise RemoteRefused(
                f"{self.url} is not asked, since key_file={self.key_file!r} cannot be read ({error}): it is a file "
                "with the key and nothing else; correct the path"
            ) from error

    def _read(
        self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse, deadline: float
    ) -> bytes:
        """All of an answer; a server that sends a byte now and then is out of time as well."""
        received = bytearray()
        while len(received) < self.max_answer_bytes:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("the answer did not end in time")
            if connection.sock is not None:
                connection.sock.settimeout(left)
            chunk = response.read1(1 << 16)
            if not chunk:
                return bytes(received)
            received += chunk
        raise TimeoutError(f"the answer is longer than {self.max_answer_bytes} bytes")


def attempted(
    act: Callable[[], T],
    *,
    attempts: int,
    wait_s: float,
    passing: tuple[type[Exception], ...] = (RemoteUnavailable, RemoteUnreadable),
    for_good: type[Exception] = RemoteRefused,
    saw: Callable[[int, Exception], None] = lambda *_: None,
) -> T:
    """The result of `act`, tried again where a fault may pass.

    Args:
        act: one attempt.
        attempts: at most, the first included.
        wait_s: pause before the second attempt; it doubles with each further one.
        passing: faults that are worth another attempt.
        for_good: of these, the one that is not.
        saw: told the number of the attempt, from 1, and its fault.

    Raises:
        Exception: the fault of the last attempt.
    """
    for attempt in range(1, attempts + 1):
        try:
            return act()
        except passing as error:
            saw(attempt, error)
            if isinstance(error, for_good) or attempt == attempts:
                raise
        time.sleep(wait_s * 2 ** (attempt - 1))
    raise AssertionError(f"attempts={attempts}")


def refuse_no_address(what: str, url: str) -> None:
    """Raises: ValueError when `url`, the setting `what`, is no base of an HTTP interface."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"{what}={url!r} is no endpoint: allowed are http:// and https:// addresses; write the base of the "
            "OpenAI-compatible interface, such as http://host:8000/v1"
        )
