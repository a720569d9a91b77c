"""OpenAI's interface as far as we speak it: bodies of requests to questions, samples to bodies of answers.

A parameter that would change the answer and that we do not have is refused, never passed over.
Source: the OpenAI API reference, completions and chat completions; token ids as vLLM extends them.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_m1.rl.draw import sample_keys
from megatron_m1.rl.sample import Sample
from megatron_m1.serving.model import Drawing, Limits, TextCoder

MOST_CHOICES = 256
DEFAULT_COMPLETION_TOKENS = 16
"""What OpenAI's interface generates where `max_tokens` is not given."""
# what these would change is not built; null and these values change nothing
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stop": ([],),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
}


@dataclass(frozen=True, slots=True)
class Choice:
    """One sample that is asked for."""

    prompt: list[int]
    key: int
    """64 bits that its random numbers are made of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One request, understood."""

    choices: list[Choice]
    drawing: Drawing
    max_tokens: int
    is_chat: bool
    wants_log_probs: bool
    names_ids: bool
    """Tokens of log-probabilities are called `token_id:N`, not by their text."""
    streams: bool


class BadRequest(ValueError):
    """A request that we cannot serve; the text goes back to whoever asked."""


def read_completion(body: Any, coder: TextCoder, limits: Limits) -> Question:
    """A body of POST /v1/completions.

    Raises:
        BadRequest: something in it is missing, wrong, or not supported.
    """
    body = _checked(body)
    prompts = [
        coder.tokens(prompt) if isinstance(prompt, str) else prompt for prompt in _prompts(body.get("prompt"))
    ]
    return _question(body, prompts, coder.end_token, limits, DEFAULT_COMPLETION_TOKENS, is_chat=False)


def read_chat(body: Any, coder: TextCoder, limits: Limits) -> Question:
    """A body of POST /v1/chat/completions.

    Raises:
        BadRequest: as `read_completion`, or a conversation that the chat template refuses.
    """
    body = _checked(body)
    prompt, end_token = coder.chat_prompt(body.get("messages"), body.get("tools"))
    body.setdefault("max_tokens", body.get("max_completion_tokens"))
    return _question(body, [prompt], end_token, limits, limits.window, is_chat=True)


def _checked(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise BadRequest(f"the body is {type(body).__name__}: it must be a JSON object")
    for name, neutral in NEUTRAL.items():
        if body.get(name) is not None and body[name] not in neutral:
            raise BadRequest(
                f"{name}={body[name]!r} is not supported: leave it out, or set it to {neutral[0]!r}"
            )
    return dict(body)


def _prompts(given: Any) -> list[Any]:
    """One prompt or several, each a text or a list of ids."""
    if isinstance(given, str) or (isinstance(given, list) and given and isinstance(given[0], int)):
        given = [given]
    if not isinstance(given, list) or not given:
        raise BadRequest("prompt is missing: it must be a text, a list of token ids, or a list of either")
    for prompt in given:
        is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
        if not isinstance(prompt, str) and not is_ids:
            raise BadRequest(f"prompt {str(prompt)[:60]!r} is neither a text nor a list of token ids")
    return given


def _question(
    body: dict[str, Any],
    prompts: list[list[int]],
    end_token: int,
    limits: Limits,
    default_tokens: int,
    *,
    is_chat: bool,
) -> Question:
    number = _number(body, "n", 1, 1, MOST_CHOICES, whole=True)
    longest = max(len(prompt) for prompt in prompts)
    if not all(prompts) or longest >= limits.window:
        raise BadRequest(
            f"the prompts have {[len(prompt) for prompt in prompts]} tokens: allowed are 1 to {limits.window - 1}, "
            f"since prompt and answer share a window of {limits.window} tokens"
        )
    ends = body.get("stop_token_ids") or [end_token]
    if not (isinstance(ends, list) and len(ends) == 1 and type(ends[0]) is int):
        raise BadRequest(f"stop_token_ids={ends!r}: one token id is allowed, which ends an answer")
    drawing = Drawing(
        temperature=_number(body, "temperature", 1.0, 0.0, 100.0),
        top_p=_number(body, "top_p", 1.0, 1e-6, 1.0),
        end_token=ends[0],
    )
    log_probs = body.get("logprobs")
    if not isinstance(log_probs, bool | None) and log_probs not in (0, 1):
        raise BadRequest(f"logprobs={log_probs!r}: only those of the drawn tokens are given; set it to 1")
    return Question(
        choices=_choices(body.get("seed"), prompts, int(number)),
        drawing=drawing,
        max_tokens=int(_number(body, "max_tokens", default_tokens, 1, limits.window, whole=True)),
        is_chat=is_chat,
        wants_log_probs=log_probs is not None and log_probs is not False,
        names_ids=bool(body.get("return_tokens_as_token_ids")),
        streams=bool(body.get("stream")),
    )


def _choices(seed: Any, prompts: list[list[int]], number: int) -> list[Choice]:
    """`number` samples of every prompt. A seed is the key of the first; the others' are made of it and their place."""
    if seed is None:
        seed = secrets.randbits(63)
    if type(seed) is not int or not -(2**63) <= seed < 2**63:
        raise BadRequest(f"seed={seed!r}: a whole number of 64 bits is allowed")
    first = int(np.array([seed], dtype=np.int64).view(np.uint64)[0])
    found = []
    for place, prompt in enumerate(prompts):
        for sample in range(number):
            key = first
            if place or sample:
                key = int(sample_keys(first, np.array([place]), np.array([sample]))[0])
            found.append(Choice(prompt, key))
    return found


def _number(
    body: dict[str, Any], name: str, default: float, low: float, high: float, *, whole: bool = False
) -> float:
    value = body.get(name)
    if value is None:
        return default
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise BadRequest(
            f"{name}={value!r}: allowed are {'whole ' if whole else ''}numbers from {low} to {high}"
        )
    return value


def answer(
    question: Question, samples: Sequence[Sample], model: str, step: int, text_of: Callable[[Any], str]
) -> dict[str, Any]:
    """The body that goes back, choices in the order in which they were asked for."""
    kind = "chat.completion" if question.is_chat else "text_completion"
    made = sum(len(sample.tokens_S) for sample in samples)
    # every prompt counts once, however many samples it has
    read = sum(
        len(prompt) for prompt in {id(choice.prompt): choice.prompt for choice in question.choices}.values()
    )
    return {
        "id": f"{'chatcmpl' if question.is_chat else 'cmpl'}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"step_{step:08d}",
        "choices": [_choice(question, number, sample, text_of) for number, sample in enumerate(samples)],
        "usage": {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made},
    }


def _choice(question: Question, number: int, sample: Sample, text_of: Callable[[Any], str]) -> dict[str, Any]:
    tokens = [int(token) for token in sample.tokens_S]
    # the end token is an id, not a part of the text
    said = tokens[:-1] if sample.finish == "stop" else tokens
    text = text_of(said)
    choice: dict[str, Any] = {
        "index": number,
        "finish_reason": sample.finish,
        "logprobs": None,
        "token_ids": tokens,
        "prompt_token_ids": question.choices[number].prompt,
    }
    if question.wants_log_probs:
        names = [f"token_id:{token}" if question.names_ids else text_of([token]) for token in tokens]
        choice["logprobs"] = _log_probs(question, names, [float(value) for value in sample.log_probs_S])
    if question.is_chat:
        return choice | {"message": {"role": "assistant", "content": text}}
    return choice | {"text": text}


def _log_probs(question: Question, names: list[str], values: list[float]) -> dict[str, Any]:
    if question.is_chat:
        pairs = zip(names, values, strict=True)
        return {"content": [{"token": name, "logprob": value, "top_logprobs": []} for name, value in pairs]}
    return {"tokens": names, "token_logprobs": values, "top_logprobs": None}


def as_stream(whole: dict[str, Any]) -> list[dict[str, Any]]:
    """The same answer as the events of a stream: each choice comes whole in one of them."""
    events = []
    for choice in whole["choices"]:
        part = dict(choice)
        if "message" in part:
            part["delta"] = part.pop("message")
        events.append(
            whole | {"object": whole["object"].replace("completion", "completion.chunk"), "choices": [part]}
        )
        if not whole["object"].startswith("chat"):
            events[-1]["object"] = whole["object"]
    return events
