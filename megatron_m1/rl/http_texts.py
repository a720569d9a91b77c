"""Texts of a model behind an OpenAI-compatible endpoint: for judging it, not for learning from it (http_engine.py).

Any server of the interface will do: neither token ids nor log-probabilities are asked for.
"""

from __future__ import annotations

import concurrent.futures
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from megatron_m1.rl.draw import sample_keys
from megatron_m1.rl.engine_config import HttpEngineConfig
from megatron_m1.rl.http_engine import EngineError
from megatron_m1.rl.pass_rate import Answer, PassRateConfig
from megatron_m1.rl.remote import RemoteUnavailable, RemoteUnreadable, attempted
from megatron_m1.rl.sample import Prompt


def answers_of(
    endpoint: HttpEngineConfig, prompts: Iterable[Prompt], config: PassRateConfig
) -> Iterator[tuple[Prompt, Sequence[Answer]]]:
    """The answers to each prompt, in order; `endpoint.concurrency` of them are asked for at once.

    Raises:
        EngineError: the server does not do its part, after as many attempts as it is allowed.
    """
    ahead = 2 * endpoint.concurrency // config.samples + 1
    waiting: deque[tuple[Prompt, list[concurrent.futures.Future[Answer]]]] = deque()
    with concurrent.futures.ThreadPoolExecutor(endpoint.concurrency, "texts") as pool:
        try:
            for prompt in prompts:
                numbers = range(config.samples)
                waiting.append((prompt, [pool.submit(_ask, endpoint, prompt, n, config) for n in numbers]))
                if len(waiting) > ahead:
                    yield _taken(*waiting.popleft())
            while waiting:
                yield _taken(*waiting.popleft())
        except (RemoteUnavailable, RemoteUnreadable) as error:
            raise EngineError(
                f"the server does not answer after {endpoint.attempts} attempts: {error}; look at it, then start the "
                "same command again: it goes on from what is on record"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _taken(
    prompt: Prompt, asked: Sequence[concurrent.futures.Future[Answer]]
) -> tuple[Prompt, Sequence[Answer]]:
    return prompt, [one.result() for one in asked]


def _ask(endpoint: HttpEngineConfig, prompt: Prompt, number: int, config: PassRateConfig) -> Answer:
    """One answer.

    Raises:
        RemoteUnavailable, RemoteUnreadable: of the last attempt.
    """
    key = sample_keys(config.seed, np.array([prompt.prompt_id]), np.array([number]))
    body: dict[str, Any] = {
        "model": endpoint.model,
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        # 64 signed bits, as http_engine.py sends them
        "seed": int(key.view(np.int64)[0]),
    }
    if config.chat:
        path = "/chat/completions"
        body["messages"] = [{"role": "user", "content": prompt.text}]
    else:
        path = "/completions"
        body["prompt"] = prompt.text

    def attempt() -> Answer:
        return _read(endpoint.url, endpoint.remote().exchange("POST", path, body), config)

    return attempted(attempt, attempts=endpoint.attempts, wait_s=endpoint.wait_s)


def _read(url: str, answer: Any, config: PassRateConfig) -> Answer:
    """Raises: RemoteUnreadable: it holds no text."""
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] if config.chat else choice["text"]
        was_cut = choice["finish_reason"] == "length"
    except (KeyError, IndexError, TypeError) as error:
        raise RemoteUnreadable(
            f"{url} sent no choice with a text and a finish_reason ({type(error).__name__}: {error}): "
            f"{str(answer)[:200]}"
        ) from error
    if not isinstance(text, str):
        raise RemoteUnreadable(f"{url} sent {text!r} for a text")
    return Answer(text=text, was_cut=was_cut)
