"""Prompts of a run: where they come from, and the order in which each is used once per pass.

The order of a task is a keyed permutation of its prompts, another one in every pass, so the ledger of used prompts is
one count per task. A prompt of a later pass has an id of its own, so that its samples draw other random numbers.
Texts are made and encoded by the caller: no tokenizer lives here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_m1.rl.rewards.answer import AnswerPlace
from megatron_m1.rl.rewards.code import CodeReward
from megatron_m1.rl.rewards.exact import ExactReward
from megatron_m1.rl.rewards.generative import GradeReward, PairwiseReward
from megatron_m1.rl.rewards.interface import Reward
from megatron_m1.rl.rewards.judge import JudgeConfig
from megatron_m1.rl.rewards.logic.reward import FAMILIES, LogicReward, answer_of, make_puzzle
from megatron_m1.rl.rewards.math import MathReward
from megatron_m1.rl.rewards.software import SoftwareReward
from megatron_m1.rl.sample import Prompt

SourceKind = Literal["file", "logic", "synthetic"]
RewardKind = Literal["exact", "math", "logic", "code", "software", "grade", "pairwise"]
_MADE_BY_RULE: dict[str, RewardKind] = {"logic": "logic", "synthetic": "exact"}

Order = Callable[[str, int, int], Callable[[int], int]]
"""(task, pass, number of prompts) -> a permutation of that many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSource:
    """One task: its prompts and the reward that scores them."""

    name: str
    """Name of the task in curriculum, metrics and errors."""
    kind: SourceKind = "file"
    """`file`: JSONL. `logic`: puzzles of a family. `synthetic`: a task of data_pipeline/synthetic.py."""
    path: str = ""
    """For `file`: one object per line with "prompt", and "answer" as its reward wants it."""
    task: str = ""
    """For `logic` the family, for `synthetic` the task."""
    count: int = 1000
    """For those two: how many prompts."""
    difficulty: int = 1
    """For `logic`: 1 to 10."""
    length_words: int = 8
    """For `synthetic`: about how many words stand before the question."""
    reward: RewardKind | None = None
    """None: `logic` and `exact` for prompts that are made by rule; files must say it."""
    place: AnswerPlace | None = None
    """Where in a text the answer is looked for; None: boxed, and the whole text for `exact`."""
    judge: JudgeConfig | None = None
    """For `grade` and `pairwise`: who is asked."""

    def __post_init__(self) -> None:
        has_path = bool(self.path)
        if has_path != (self.kind == "file") or bool(self.task) == has_path:
            raise ValueError(
                f"rl source {self.name!r} of kind {self.kind!r} has path={self.path!r} and task={self.task!r}: a file "
                "has a path and no task, the others have a task and no path; correct them"
            )
        if self.kind == "logic" and self.task not in FAMILIES:
            raise ValueError(
                f"rl source {self.name!r} has task={self.task!r}: the families are {', '.join(sorted(FAMILIES))}; "
                "choose one of them"
            )
        if self.count < 1 or self.length_words < 1:
            raise ValueError(
                f"rl source {self.name!r} has count={self.count}, length_words={self.length_words}: both must be 1 or "
                "more; correct them"
            )
        kind = self.reward or _MADE_BY_RULE.get(self.kind)
        if kind is None:
            raise ValueError(
                f"rl source {self.name!r} is a file and has no reward: allowed are exact, math, logic, code, software, "
                "grade, pairwise; name the one that fits its answers"
            )
        if (kind in ("grade", "pairwise")) != (self.judge is not None):
            raise ValueError(
                f"rl source {self.name!r} has reward={kind!r} and judge={self.judge}: grade and pairwise have a judge "
                "and the others none; add it (url, model), or remove it"
            )

    def build_reward(self) -> Reward:
        """The reward of this task."""
        kind = self.reward or _MADE_BY_RULE[self.kind]
        if self.judge is not None:
            return (GradeReward if kind == "grade" else PairwiseReward)(judge=self.judge)
        if kind in ("code", "software"):
            return CodeReward() if kind == "code" else SoftwareReward()
        if kind == "exact":
            return ExactReward(place=self.place or "whole")
        place = self.place or "boxed"
        return MathReward(place=place) if kind == "math" else LogicReward(place=place)


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt before it has tokens."""

    text: str
    answer: Any


def puzzles(source: PromptSource, seed: int) -> Iterator[Question]:
    """The prompts of a `logic` source."""
    for index in range(source.count):
        puzzle = make_puzzle(source.task, seed=seed, index=index, difficulty=source.difficulty)
        yield Question(puzzle.question, answer_of(source.task, puzzle))


def read_questions(source: PromptSource) -> Iterator[Question]:
    """The prompts of a `file` source.

    Raises:
        ValueError: as `read_objects`.
    """
    for value in read_objects(source):
        yield Question(value["prompt"], value.get("answer"))


def read_objects(source: PromptSource) -> Iterator[dict[str, Any]]:
    """The lines of a `file` source as they stand there; blank ones are passed over.

    Raises:
        ValueError: a file that cannot be read, or a line that is no prompt.
    """
    try:
        # not splitlines, which also cuts at separators that may stand inside a text
        lines = Path(source.path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"rl source {source.name!r}: {source.path} cannot be read ({error}): it is a JSONL file; check the path"
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict) or not isinstance(value.get("prompt"), str) or not value["prompt"]:
            raise ValueError(
                f"rl source {source.name!r}: line {number} of {source.path} is {line[:60]!r}: each is an object with a "
                '"prompt" that is not empty and an "answer" for its reward; correct the line'
            )
        yield value


class PromptBook:
    """All prompts of a run and how many of each task were taken.

    Args:
        by_task: task -> its prompts; ids count through all of them from 0.
        order: of each task and pass.

    Raises:
        ValueError: a task without prompts.
    """

    def __init__(self, by_task: Mapping[str, Sequence[Prompt]], order: Order) -> None:
        for task, prompts in by_task.items():
            if not prompts:
                raise ValueError(
                    f"rl source {task!r} has 0 prompts: it needs 1 or more; fill it or remove it"
                )
        self._by_task, self._order = dict(by_task), order
        self._all = [prompt for prompts in by_task.values() for prompt in prompts]
        ids = [prompt.prompt_id for prompt in self._all]
        assert ids == list(range(len(ids))), "ids count through all tasks"
        self.taken = dict.fromkeys(by_task, 0)
        """Prompts taken of each task since the run began: the whole ledger."""

    @property
    def sizes(self) -> dict[str, int]:
        """Prompts of each task."""
        return {task: len(prompts) for task, prompts in self._by_task.items()}

    def all(self) -> Sequence[Prompt]:
        """Every prompt, by number."""
        return self._all

    def take(self, task: str) -> Prompt:
        """The next prompt of a task, never given before under its id."""
        prompts = self._by_task[task]
        taken = self.taken[task]
        self.taken[task] = taken + 1
        number = self._order(task, taken // len(prompts), len(prompts))(taken % len(prompts))
        return self.by_id(taken // len(prompts) * len(self._all) + prompts[number].prompt_id)

    def by_id(self, prompt_id: int) -> Prompt:
        """The prompt that `take` gave under this id."""
        return replace(self._all[prompt_id % len(self._all)], prompt_id=prompt_id)

    def identity(self) -> str:
        """A hash of all prompts: a ledger means nothing with others."""
        hashed = hashlib.sha256()
        for prompt in self._all:
            hashed.update(json.dumps([prompt.task, prompt.text, prompt.answer], sort_keys=True).encode())
            hashed.update(prompt.tokens_S.tobytes())
        return hashed.hexdigest()


@dataclass(slots=True)
class Fates:
    """What became of the prompts that were taken; each is counted once."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, fate: str, count: int = 1) -> None:
        """Count prompts."""
        self.counts[fate] = self.counts.get(fate, 0) + count

    @property
    def total(self) -> int:
        """All prompts that have left the queue."""
        return sum(self.counts.values())
