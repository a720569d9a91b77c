"""Prompts by how often a given model solves them: the rates on record, and the choice of those worth learning from.

A prompt that is always solved, or never, teaches a group-relative advantage nothing. MiniMax-M1 (arXiv 2506.13585,
sections 4.1 and 5) keeps mathematics that a strong model solves strictly between 0 and 0.9 of ten times, which is the
default, logic that a weak model solves strictly between 0 and 0.5, and drops what its 40K model finds easy for 80K.
The record has one line per prompt, written when it is known, so a life that was killed costs the prompts under way.
Who answers is not known here: serving/rating.py.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_m1.rl.rewards.answer import AnswerPlace
from megatron_m1.rl.rewards.pool import RewardPool, Verdict
from megatron_m1.rl.sample import Prompt

# verdicts under way: enough to keep the reward processes busy while the model answers
_MOST_WAITING = 256
FATES = ("kept", "too hard", "too easy", "no verdict")


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRateConfig:
    """How a prompt is tried, and which rates are kept: the section `rate` of `m1 data pass-rate`."""

    samples: int = 10
    """Answers per prompt."""
    above: float = 0.0
    below: float = 0.9
    """Prompts are kept whose pass rate is strictly between the two."""
    temperature: float = 1.0
    max_tokens: int = 1024
    """Longest answer; one that is cut there is judged as it stands, and counted."""
    seed: int = 0
    """Every answer's random numbers are made of it, the number of the prompt and that of the answer."""
    chat: bool = False
    """Prompts are what a user says, in the model's chat template; otherwise they are continued as they stand."""
    place: AnswerPlace | None = None
    """Where in a text the answer is looked for; None: where the reward looks by itself."""
    at_once: int = 32
    """Answers generated, or asked for, at once."""
    workers: int = 2
    """Processes that judge."""

    def __post_init__(self) -> None:
        for name in ("samples", "max_tokens", "at_once", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"rate.{name}={getattr(self, name)} is no count: it must be 1 or more; correct it"
                )
        if self.temperature < 0:
            raise ValueError(
                f"rate.temperature={self.temperature}: it must be 0 or more; 1 draws from the model itself"
            )
        if not self.above < self.below or self.below <= 0 or self.above >= 1:
            raise ValueError(
                f"pass rates strictly between rate.above={self.above} and rate.below={self.below} do not exist: "
                "allowed are above < below, above under 1 and below over 0; MiniMax-M1's mathematics has 0 and 0.9"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One text that the model gave."""

    text: str
    was_cut: bool
    """It ended because it was long, not by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """What became of the answers to one prompt."""

    number: int
    """Of the prompt in its file, from 0."""
    passed: int
    judged: int
    """Answers that the reward had a verdict on."""
    cut: int
    failures: Mapping[str, int] = field(default_factory=dict)
    """The others, by kind."""

    @property
    def pass_rate(self) -> float | None:
        """Share of the judged answers that passed; None where the reward failed on more than half."""
        failed = sum(self.failures.values())
        return None if not self.judged or failed > self.judged else self.passed / self.judged

    def fate(self, config: PassRateConfig) -> str:
        """One of FATES."""
        if self.pass_rate is None:
            return "no verdict"
        if self.pass_rate <= config.above:
            return "too hard"
        return "kept" if self.pass_rate < config.below else "too easy"


class RateRecord:
    """The rates known so far, in a file of one JSON line each behind one line that says how they were found.

    Args:
        path: of the file; made when there is none.
        about: what rates depend on, of JSON types.

    Raises:
        ValueError: the file is of other prompts, another model or other settings, or cannot be written.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.rates: dict[int, Rate] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
            # what stands behind the last newline was cut by a kill
            whole = [json.loads(line) for line in lines[:-1]]
            if whole and whole[0] != about:
                raise ValueError(_differs(path, whole[0], about))
            for values in whole[1:]:
                self.rates[values["number"]] = Rate(**values)
            self._file = path.open("r+b" if path.exists() else "wb")
            self._file.truncate(sum(len(line) + 1 for line in lines[:-1]))
            self._file.seek(0, os.SEEK_END)
            if not whole:
                self._append(dict(about))
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"the record of pass rates {path} cannot be used ({type(error).__name__}: {error}): it is a file that "
                "this command wrote, in a directory that can be written; move it away, or choose another --out"
            ) from error

    def add(self, rate: Rate) -> None:
        """Put one more on record; it survives this process."""
        self.rates[rate.number] = rate
        self._append(asdict(rate))

    def _append(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> RateRecord:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _differs(path: Path, found: Any, about: Mapping[str, Any]) -> str:
    found = found if isinstance(found, dict) else {}
    names = sorted(name for name in {*found, *about} if found.get(name) != about.get(name))
    told = ", ".join(f"{name} {found.get(name)!r} instead of {about.get(name)!r}" for name in names)
    return (
        f"the record of pass rates {path} was made with {told}: rates of two settings are not mixed; set them back, "
        "move the record away, or choose another --out"
    )


def rate_all(
    answered: Iterable[tuple[Prompt, Sequence[Answer]]], pool: RewardPool, *, solved_at: float = 1.0
) -> Iterator[Rate]:
    """The rate of each prompt, in order; verdicts are taken while the model goes on answering."""
    waiting: deque[tuple[Prompt, Sequence[Answer], list[concurrent.futures.Future[Verdict]]]] = deque()
    for prompt, answers in answered:
        waiting.append((prompt, answers, [pool.submit(prompt, answer.text) for answer in answers]))
        while waiting and (
            len(waiting) * len(answers) > _MOST_WAITING or all(one.done() for one in waiting[0][2])
        ):
            yield _rate(*waiting.popleft(), solved_at)
    while waiting:
        yield _rate(*waiting.popleft(), solved_at)


def _rate(
    prompt: Prompt,
    answers: Sequence[Answer],
    asked: Sequence[concurrent.futures.Future[Verdict]],
    solved_at: float,
) -> Rate:
    verdicts = [one.result() for one in asked]
    values = [verdict.value for verdict in verdicts if verdict.value is not None]
    return Rate(
        number=prompt.prompt_id,
        passed=sum(value >= solved_at for value in values),
        judged=len(values),
        cut=sum(answer.was_cut for answer in answers),
        failures=dict(Counter(verdict.failure for verdict in verdicts if verdict.failure is not None)),
    )


def write_chosen(
    out: Path, objects: Sequence[dict[str, Any]], rates: Mapping[int, Rate], config: PassRateConfig
) -> dict[str, int]:
    """Write the prompts that are kept to `out` and the others beside it, each with its rate; how many met which fate.

    objects: the prompts as their file has them.
    """
    fates = [rates[number].fate(config) for number in range(len(objects))]
    for path, wanted in ((out, True), (dropped_path(out), False)):
        half = path.with_name(path.name + ".half")
        with half.open("w", encoding="utf-8") as file:
            for number, (values, fate) in enumerate(zip(objects, fates, strict=True)):
                if (fate == "kept") == wanted:
                    line = values | {"pass_rate": rates[number].pass_rate}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        half.replace(path)
    return {fate: fates.count(fate) for fate in FATES}


def dropped_path(out: Path) -> Path:
    """Where the prompts go that are not kept."""
    return out.with_suffix(".dropped.jsonl")


def record_path(out: Path) -> Path:
    """Where the rates are on record."""
    return out.with_suffix(".rates.jsonl")
