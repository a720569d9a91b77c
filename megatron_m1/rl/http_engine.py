"""Generation by an OpenAI-compatible server (vLLM, SGLang, `m1 serve`): prompts and answers travel as token ids.

The server must name token ids (`return_token_ids`, or `return_tokens_as_token_ids` in the log-probabilities, as vLLM
and `m1 serve` do) and give log-probabilities of the model itself, at temperature 1. Every request has a seed made of
the run's seed, the prompt and the sample, so `m1 serve` draws what the trainer's own generator would draw. Rank 0 asks;
the other ranks are told. Router decisions do not travel this way: replay needs the trainer's own generator.
Legend: S tokens of one sample.
"""

from __future__ import annotations

import concurrent.futures
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import torch.distributed as dist

from megatron_m1.rl.draw import sample_keys
from megatron_m1.rl.engine_config import HttpEngineConfig
from megatron_m1.rl.generate import GenerationConfig, Request
from megatron_m1.rl.remote import (
    RemoteUnavailable,
    RemoteUnreadable,
    attempted,
)
from megatron_m1.rl.sample import FinishReason, Sample
from megatron_m1.rl.stop import repeats_at

_LOG = logging.getLogger(__name__)
Publish = Callable[[int], Path]
"""Makes the weights of a step readable for the server, collective; where they lie."""
_TOKEN_NAME = re.compile(r"token_id:(\d+)")


class EngineError(RuntimeError):
    """An engine cannot generate; says what it was asked, how often, and what came back."""


class HttpEngine:
    """An engine of `rollout.py` behind HTTP; every method is collective and does the same on each rank.

    Args:
        config: the server.
        drawing: how to draw and when to end; the window comes with each call, slots and prefill are the server's.
        text_of: decodes generated tokens.
        publish: called when the weights have changed; the server then loads them from where they lie.

    Raises:
        EngineError: no server, or it does not know the model.
    """

    def __init__(
        self,
        config: HttpEngineConfig,
        drawing: GenerationConfig,
        *,
        text_of: Callable[[np.ndarray], str],
        publish: Publish,
    ) -> None:
        self._config, self._drawing, self._text_of, self._publish = config, drawing, text_of, publish
        self._version: int | None = None
        self._counts: Counter[str] = Counter()
        self._push_s = 0.0
        self._on_first_rank(lambda: check_model(config, "rl.engine"))

    def counts(self) -> dict[str, int]:
        """Requests, and what went wrong with them, since the engine began; rank 0 counts."""
        return {name: self._counts[name] for name in ("requests", "unavailable", "unreadable", "failed")}

    def metrics(self) -> dict[str, float]:
        """Requests and faults since the engine began, also those that another attempt made good, and the seconds that
        the newest weights took from the model to the server.
        """
        counts = {f"engine_{name}": float(count) for name, count in self.counts().items()}
        return self._on_first_rank(lambda: counts | {"engine_weights_s": self._push_s})

    def generate(
        self, requests: Sequence[Request], *, window: int, version: int, max_passes: int | None
    ) -> list[Sample]:
        """See `rollout.Engine`; a pass is a token here.

        Raises:
            ValueError: a prompt leaves no room in the window.
            EngineError: the server does not do its part; no sample of this call is kept.
        """
        drawing = replace(self._drawing, window=window)
        call = _Call(self._config, drawing, version, self._text_of, max_passes, self._counts)
        for request in requests:
            call.check_room(request)
        if version != self._version:
            started = time.monotonic()
            path = self._publish(version)
            self._on_first_rank(lambda: self._push(version, path))
            self._version, self._push_s = version, time.monotonic() - started
            _LOG.info("engine has the weights of step %d after %.2f s", version, self._push_s)
        return self._on_first_rank(lambda: self._run(call, requests))

    def _run(self, call: _Call, requests: Sequence[Request]) -> list[Sample]:
        with concurrent.futures.ThreadPoolExecutor(self._config.concurrency, "engine") as pool:
            waiting = [pool.submit(call.sample, request) for request in requests]
            concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_EXCEPTION)
            failed = [one for one in waiting if one.done() and one.exception() is not None]
            if failed:
                pool.shutdown(wait=False, cancel_futures=True)
                self._counts["failed"] += len(failed)
                error = failed[0].exception()
                raise EngineError(
                    f"{len(failed)} of {len(requests)} samples failed at {self._config.url} after "
                    f"{self._config.attempts} attempts each (counts so far: {self.counts()}); the first: {error}; look "
                    "at the server, then resume from the newest checkpoint"
                ) from error
            return [one.result() for one in waiting]

    def _push(self, version: int, path: Path) -> None:
        # beside the OpenAI interface, not below it
        parts = urlsplit(self._config.url)
        root = urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/").removesuffix("/v1"), "", ""))
        try:
            answer = replace(self._config.remote(), url=root).exchange(
                "POST", "/update_weights_from_disk", {"model_path": str(path.absolute())}
            )
        except (RemoteUnavailable, RemoteUnreadable) as error:
            raise EngineError(
                f"the engine did not load the weights of step {version} from {path}: {error}; the path is the "
                "server's, of a complete checkpoint"
            ) from error
        if not (isinstance(answer, dict) and answer.get("success")):
            raise EngineError(f"the engine did not load the weights of step {version}: {str(answer)[:200]}")

    def _on_first_rank(self, act: Callable[[], Any]) -> Any:
        """Rank 0 acts; its result, or its error, on every rank."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return act()
        told: list[Any] = [None, None]
        if dist.get_rank() == 0:
            try:
                told = [act(), None]
            except EngineError as error:
                told = [None, str(error)]
        dist.broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise EngineError(told[1])
        return told[0]


def check_model(config: HttpEngineConfig, setting: str) -> None:
    """Prove that the server is there and has the model.

    setting: what a user would correct.

    Raises:
        EngineError: it is not, or has not.
    """
    try:
        answer = config.remote().exchange("GET", "/models", None)
        names = [model["id"] for model in answer["data"]]
    except (RemoteUnavailable, RemoteUnreadable, KeyError, TypeError) as error:
        raise EngineError(
            f"no engine at {setting}.url={config.url!r} ({type(error).__name__}: {error}): it must answer "
            "GET /models as OpenAI's interface does; start the server, or correct the url"
        ) from error
    if config.model not in names:
        raise EngineError(
            f"the engine at {config.url} has no model {config.model!r}: it serves {names}; correct {setting}.model"
        )


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of `generate`: what every of its requests has in common."""

    config: HttpEngineConfig
    drawing: GenerationConfig
    version: int
    text_of: Callable[[np.ndarray], str]
    max_passes: int | None
    counts: Counter[str]

    def check_room(self, request: Request) -> None:
        """Raises: ValueError when the prompt fills the window."""
        if self._room(request) < 1:
            raise ValueError(
                f"prompt {request.prompt.prompt_id} has {len(request.prompt.tokens_S)} tokens and "
                f"{_num_earlier(request)} generated ones: a window of {self.drawing.window} tokens leaves no room for "
                "an answer; drop the prompt, or raise the window"
            )

    def sample(self, request: Request) -> Sample:
        """Ask for one sample, as often as the configuration bears.

        Raises:
            RemoteUnavailable, RemoteUnreadable: of the last attempt.
        """
        room = self._room(request)
        most = min(room, self.max_passes or room, request.max_tokens or room)

        def ask() -> Sample:
            self.counts["requests"] += 1
            answer = self.config.remote().exchange("POST", "/completions", self._body(request, most))
            return self._read(request, answer, most)

        def count(attempt: int, error: Exception) -> None:
            self.counts["unreadable" if isinstance(error, RemoteUnreadable) else "unavailable"] += 1
            prompt, most = request.prompt.prompt_id, self.config.attempts
            _LOG.warning("attempt %d of %d for prompt %d: %s", attempt, most, prompt, error)

        return attempted(ask, attempts=self.config.attempts, wait_s=self.config.wait_s, saw=count)

    def _body(self, request: Request, most: int) -> dict[str, Any]:
        earlier = request.earlier.tokens_S if request.earlier else np.zeros(0, dtype=np.int64)
        return {
            "model": self.config.model,
            "prompt": [*request.prompt.tokens_S.tolist(), *earlier.tolist()],
            "max_tokens": most,
            "temperature": self.drawing.temperature,
            "top_p": self.drawing.top_p,
            "seed": self._seed(request),
            "stop_token_ids": [self.drawing.end_token],
            "logprobs": 1,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
        }

    def _seed(self, request: Request) -> int:
        """64 signed bits. A sample that is carried on begins to count anew at the server, so it has another seed."""
        prompt, sample = np.array([request.prompt.prompt_id]), np.array([request.sample_id])
        key = sample_keys(self.drawing.seed, prompt, sample)
        if request.key is not None:
            key = np.array([request.key], dtype=np.uint64)
        if request.earlier is not None:
            key = sample_keys(int(key[0]), np.array([len(request.earlier.tokens_S)]), sample)
        return int(key.view(np.int64)[0])

    def _read(self, request: Request, answer: Any, most: int) -> Sample:
        """The sample of an answer.

        Raises:
            RemoteUnreadable: it has no token ids, no log-probabilities, or numbers that cannot be.
        """
        try:
            choice = answer["choices"][0]
            log_probs = choice["logprobs"]["token_logprobs"]
            tokens = choice.get("token_ids") or [_token_of(name) for name in choice["logprobs"]["tokens"]]
            tokens_S = np.array(tokens, dtype=np.int64)
            log_probs_S = np.minimum(np.array(log_probs, dtype=np.float32), 0.0)
            reason = choice["finish_reason"]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise RemoteUnreadable(
                f"{self.config.url} sent no choice with token ids and log-probabilities "
                f"({type(error).__name__}: {error}): {str(answer)[:200]}"
            ) from error
        ends = reason == "stop"
        if not 0 < len(tokens_S) <= most or len(tokens_S) != len(log_probs_S):
            raise RemoteUnreadable(
                f"{self.config.url} sent {len(tokens_S)} tokens and {len(log_probs_S)} log-probabilities for at most "
                f"{most} tokens"
            )
        if reason == "length" and len(tokens_S) < most:
            raise RemoteUnreadable(
                f"{self.config.url} ended after {len(tokens_S)} of {most} tokens: its window is smaller than ours; "
                f"start it with a window of {self.drawing.window} tokens"
            )
        if reason not in ("stop", "length") or (tokens_S[-1] == self.drawing.end_token) != ends:
            raise RemoteUnreadable(
                f"{self.config.url} ended with {reason!r} after token {tokens_S[-1]}: allowed are 'stop' with the "
                f"end token {self.drawing.end_token} last, and 'length' with another"
            )
        if not np.isfinite(log_probs_S).all():
            raise RemoteUnreadable(f"{self.config.url} sent log-probabilities that are no numbers")
        return self._finished(request, tokens_S, log_probs_S, ends=ends)

    def _finished(
        self, request: Request, tokens_S: np.ndarray, log_probs_S: np.ndarray, *, ends: bool
    ) -> Sample:
        """Join a sample with what an earlier call left, and say how it ended; our repetition stop cuts it."""
        earlier = request.earlier
        versions_S = np.full(len(tokens_S), self.version, dtype=np.int32)
        if earlier is not None:
            tokens_S = np.concatenate([earlier.tokens_S, tokens_S])
            log_probs_S = np.concatenate([earlier.log_probs_S, log_probs_S])
            versions_S = np.concatenate([earlier.versions_S, versions_S])
        is_full = len(request.prompt.tokens_S) + len(tokens_S) >= self.drawing.window
        if request.max_tokens is not None:
            is_full |= len(tokens_S) - _num_earlier(request) >= request.max_tokens
        finish: FinishReason | None = "stop" if ends else "length" if is_full else None
        cut = repeats_at(self.drawing.repetition, self.drawing.window, log_probs_S)
        if cut is not None and (cut < len(tokens_S) or not ends):
            tokens_S, log_probs_S, versions_S = tokens_S[:cut], log_probs_S[:cut], versions_S[:cut]
            finish = "repetition"
        return Sample(
            prompt_id=request.prompt.prompt_id,
            sample_id=request.sample_id,
            tokens_S=tokens_S,
            log_probs_S=log_probs_S,
            versions_S=versions_S,
            finish=finish,
            text=self.text_of(tokens_S),
        )

    def _room(self, request: Request) -> int:
        """Tokens that may still be generated."""
        return self.drawing.window - len(request.prompt.tokens_S) - _num_earlier(request)


def _num_earlier(request: Request) -> int:
    return len(request.earlier.tokens_S) if request.earlier else 0


def _token_of(name: str) -> int:
    """The id in `token_id:17`.

    Raises:
        ValueError: the name is no id.
    """
    found = _TOKEN_NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"the token {name!r} is no id; the server must support return_token_ids")
    return int(found[1])
