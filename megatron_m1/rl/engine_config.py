"""The value `rl.engine` of a run file; apart from the engine, so that reading a run file loads no megatron-core."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_m1.rl.remote import Remote, refuse_no_address


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpEngineConfig:
    """Which server generates, and how patient we are with it."""

    url: str
    """Base of the endpoint, such as http://host:8000/v1."""
    model: str
    """Name of the model there."""
    key_file: str | None = None
    """File that holds the key; its content is sent as a bearer token. None sends none."""
    request_timeout_s: float = 3600.0
    """Wall seconds for one sample, from connecting to the last byte, waiting in the server's queue included."""
    attempts: int = 3
    """Requests for one sample, the first included."""
    wait_s: float = 1.0
    """Pause before the second attempt; it doubles with each further one."""
    concurrency: int = 256
    """Requests in flight at once."""

    def __post_init__(self) -> None:
        refuse_no_address("rl.engine.url", self.url)
        if self.request_timeout_s <= 0 or self.attempts < 1 or self.wait_s < 0 or self.concurrency < 1:
            raise ValueError(
                f"rl.engine has request_timeout_s={self.request_timeout_s}, attempts={self.attempts}, "
                f"wait_s={self.wait_s}, concurrency={self.concurrency}: allowed are a time above 0, 1 or more attempts "
                "and requests, and a pause of 0 or more"
            )

    def remote(self) -> Remote:
        """The server, as one exchange sees it."""
        return Remote(url=self.url, key_file=self.key_file, request_timeout_s=self.request_timeout_s)
