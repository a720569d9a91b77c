"""Asks a model behind an OpenAI-compatible endpoint (vLLM, SGLang, `m1 serve`) and gives back its words.

A fault that may pass is tried again (`generative.py`); what stays is either "unavailable" (no answer) or "unreadable"
(an answer that is none).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_m1.rl.remote import (
    Remote,
    RemoteRefused,
    RemoteUnavailable,
    RemoteUnreadable,
    refuse_no_address,
)
from megatron_m1.rl.rewards.interface import JudgeUnavailable, JudgeUnreadable

MAX_ANSWER_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeConfig:
    """Which model judges, where, and how long it is waited for."""

    url: str
    """Base of the endpoint, such as http://host:8000/v1."""
    model: str
    """Name of the model there."""
    key_file: str | None = None
    """File that holds the key; its content is sent as a bearer token. None sends none."""
    request_timeout_s: float = 60.0
    """Wall seconds for one request, from connecting to the last byte."""
    attempts: int = 3
    """Requests for one verdict, the first included."""
    wait_s: float = 0.5
    """Pause before the second attempt; it doubles with each further one."""
    max_tokens: int = 2048
    """Longest answer."""

    def __post_init__(self) -> None:
        refuse_no_address("judge url", self.url)
        if self.request_timeout_s <= 0 or self.attempts < 1 or self.wait_s < 0 or self.max_tokens < 1:
            raise ValueError(
                f"judge has request_timeout_s={self.request_timeout_s}, attempts={self.attempts}, "
                f"wait_s={self.wait_s}, "
                f"max_tokens={self.max_tokens}: allowed are a time above 0, 1 or more attempts and tokens, and a pause "
                "of 0 or more"
            )

    @property
    def longest_s(self) -> float:
        """Seconds after which a verdict has come or failed."""
        return self.attempts * self.request_timeout_s + self.wait_s * (2**self.attempts)


def ask(config: JudgeConfig, question: str) -> str:
    """The judge's answer to one question, at temperature 0. One attempt.

    Raises:
        JudgeUnavailable: no connection, no answer in time, or a refusal.
        JudgeUnreadable: an answer that is not of the interface.
    """
    body = {
        "model": config.model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0.0,
        "max_tokens": config.max_tokens,
    }
    answer = request(config, "POST", "/chat/completions", body)
    try:
        content = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        content = None
    if not isinstance(content, str):
        raise JudgeUnreadable(f"{config.url} sent no choices[0].message.content: {str(answer)[:200]}")
    return content


def check_endpoint(config: JudgeConfig) -> None:
    """Prove that the endpoint is there and knows the model.

    Raises:
        JudgeUnavailable, JudgeUnreadable: it is not, or does not.
    """
    answer = request(config, "GET", "/models", None)
    models = answer.get("data") if isinstance(answer, dict) else None
    names = (
        [model.get("id") for model in models if isinstance(model, dict)] if isinstance(models, list) else []
    )
    if config.model not in names:
        raise JudgeUnavailable(
            f"the judge at {config.url} has no model {config.model!r}: it serves {names}; correct judge.model or start "
            "that model"
        )


class RefusedForGood(JudgeUnavailable):
    """A refusal that no second attempt changes."""


def request(config: JudgeConfig, method: str, path: str, body: dict[str, Any] | None) -> Any:
    """One exchange of JSON within `request_timeout_s`.

    Raises:
        JudgeUnavailable, JudgeUnreadable: as `ask`.
    """
    remote = Remote(
        url=config.url,
        key_file=config.key_file,
        request_timeout_s=config.request_timeout_s,
        max_answer_bytes=MAX_ANSWER_BYTES,
    )
    try:
        return remote.exchange(method, path, body)
    except RemoteRefused as error:
        raise RefusedForGood(f"the judge at {error}") from error
    except RemoteUnavailable as error:
        raise JudgeUnavailable(f"the judge at {error}") from error
    except RemoteUnreadable as error:
        raise JudgeUnreadable(f"the judge at {error}") from error
