"""The rollout queue as a value: prompts in generation, groups to be scored, groups to be learnt from.

All of it lies in the checkpoint, as JSON and flat arrays; texts are decoded again, and prompts come from the book.
Legend: S tokens of one sample, N tokens of all samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from megatron_m1.rl.collapse import CollapseState
from megatron_m1.rl.learned import Learned
from megatron_m1.rl.prompts import Fates
from megatron_m1.rl.rewards.length_watch import LengthWatchState
from megatron_m1.rl.sample import Group, Prompt, Sample, Score
from megatron_m1.rl.window import WindowState

_ARRAYS = {
    "tokens": np.int64,
    "log_probs": np.float32,
    "versions": np.int32,
    "old_log_probs": np.float32,
    "experts": np.int16,
}

_PLAIN = ("updates_left", "num_batches", "trained_tokens", "kept_share", "credits", "scores", "batch_metrics")


@dataclass(slots=True, eq=False)
class Started:
    """A prompt whose group is not complete."""

    prompt: Prompt
    samples: dict[int, Sample] = field(default_factory=dict)
    """By sample id; cut ones have no finish reason. One that is missing has not been begun."""
    window: int = 0
    """Window that its samples ended under, for the over-long penalty."""

    def is_complete(self, group_size: int) -> bool:
        """Whether every sample has ended."""
        return sum(sample.finish is not None for sample in self.samples.values()) == group_size


@dataclass(frozen=True, slots=True, eq=False)
class Unscored:
    """A complete group whose rewards are being computed."""

    started: Started
    old_log_probs: tuple[np.ndarray, ...]
    """fp32 [S] of each sample."""

    @property
    def samples(self) -> tuple[Sample, ...]:
        """In the order of their ids."""
        return tuple(self.started.samples[number] for number in sorted(self.started.samples))


@dataclass(slots=True)
class Queue:
    """Everything of a reinforcement-learning stage besides weights and optimizer."""

    running: list[Started] = field(default_factory=list)
    """Prompts in generation, oldest first."""
    unscored: list[Unscored] = field(default_factory=list)
    ready: list[Learned] = field(default_factory=list)
    """Scored groups that dynamic sampling kept, oldest first."""
    batch: list[Learned] = field(default_factory=list)
    """Groups of the present batch that are still to be learnt from."""
    updates_left: int = 0
    """Updates that the present batch still gets."""
    num_batches: int = 0
    """Generation batches begun."""
    trained_tokens: int = 0
    """Generated tokens that were learnt from."""
    kept_share: float = 1.0
    """Running share of groups that dynamic sampling kept."""
    credits: dict[str, float] = field(default_factory=dict)
    """What the curriculum owes each task."""
    fates: Fates = field(default_factory=Fates)
    window: WindowState = field(default_factory=WindowState)
    collapse: CollapseState = field(default_factory=CollapseState)
    length_watch: LengthWatchState = field(default_factory=LengthWatchState)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Rewards of texts of prompts that are in the queue, by prompt and text: no text of a group is scored twice."""
    batch_metrics: dict[str, float | int | str] = field(default_factory=dict)
    """Of the present batch; reported with each of its updates."""

    def dump(self, taken: Mapping[str, int], identity: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """JSON values and flat arrays [N] of the whole queue.

        Args:
            taken: the book's ledger.
            identity: of the book.
        """
        flat: dict[str, list[np.ndarray]] = {name: [] for name in _ARRAYS}
        about = {
            "identity": identity,
            "taken": dict(taken),
            "running": [_dump_started(started, None, flat) for started in self.running],
            "unscored": [_dump_started(one.started, one.old_log_probs, flat) for one in self.unscored],
            "ready": [_dump_learned(learned, flat) for learned in self.ready],
            "batch": [_dump_learned(learned, flat) for learned in self.batch],
            "fates": self.fates.counts,
            "window": self.window.to_json(),
            "collapse": asdict(self.collapse),
            "length_watch": asdict(self.length_watch),
        }
        about |= {name: getattr(self, name) for name in _PLAIN}
        arrays = {
            f"rl.{name}": np.concatenate([np.zeros(0, dtype), *flat[name]]) for name, dtype in _ARRAYS.items()
        }
        # a copy: the checkpoint is written while the queue goes on
        return json.loads(json.dumps(about, allow_nan=False)), arrays

    @classmethod
    def load(
        cls,
        about: dict[str, Any],
        arrays: Mapping[str, np.ndarray],
        prompt_of: Callable[[int], Prompt],
        text_of: Callable[[np.ndarray], str],
    ) -> Queue:
        """What `dump` gave.

        Args:
            about: JSON values.
            arrays: flat ones; what was empty is missing.
            prompt_of: the book's prompt of an id.
            text_of: decodes generated tokens.
        """
        reader = _Reader(arrays, text_of)
        watch = about["length_watch"]
        found = cls(
            running=[reader.started(one, prompt_of) for one in about["running"]],
            unscored=[reader.unscored(one, prompt_of) for one in about["unscored"]],
            ready=[reader.learned(one, prompt_of) for one in about["ready"]],
            batch=[reader.learned(one, prompt_of) for one in about["batch"]],
            fates=Fates(dict(about["fates"])),
            window=WindowState.from_json(about["window"]),
            collapse=CollapseState(**about["collapse"]),
            length_watch=LengthWatchState(
                **watch | {name: tuple(watch[name]) for name in ("lengths", "task_values")}
            ),
        )
        for name in _PLAIN:
            setattr(found, name, about[name])
        return found

    @property
    def in_flight(self) -> int:
        """Prompts that were taken and have not met their fate."""
        return len(self.running) + len(self.unscored) + len(self.ready) + len(self.batch)


def _dump_sample(sample: Sample, old_S: np.ndarray | None, flat: dict[str, list[np.ndarray]]) -> list[Any]:
    flat["tokens"].append(sample.tokens_S)
    flat["log_probs"].append(sample.log_probs_S)
    flat["versions"].append(sample.versions_S)
    flat["old_log_probs"].append(np.zeros(len(sample.tokens_S), np.float32) if old_S is None else old_S)
    experts = sample.experts_WLk
    if experts is not None:
        flat["experts"].append(experts.reshape(-1).astype(np.int16))
    return [sample.sample_id, len(sample.tokens_S), sample.finish, None if experts is None else experts.shape]


def _dump_started(
    started: Started, old: Sequence[np.ndarray] | None, flat: dict[str, list[np.ndarray]]
) -> dict[str, Any]:
    samples = [started.samples[number] for number in sorted(started.samples)]
    return {
        "prompt": started.prompt.prompt_id,
        "window": started.window,
        "samples": [_dump_sample(sample, old[i] if old else None, flat) for i, sample in enumerate(samples)],
    }


def _dump_learned(learned: Learned, flat: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    group = learned.group
    pairs = zip(group.samples, learned.old_log_probs, strict=True)
    return {
        "prompt": group.prompt.prompt_id,
        "samples": [_dump_sample(sample, old_S, flat) for sample, old_S in pairs],
        "scores": [dump_score(score) for score in group.scores],
    }


def dump_score(score: Score) -> dict[str, Any]:
    """JSON values of a score."""
    return asdict(score) | {"parts": dict(score.parts)}


class _Reader:
    """Takes samples off the flat arrays in the order in which they were put there."""

    def __init__(self, arrays: Mapping[str, np.ndarray], text_of: Callable[[np.ndarray], str]) -> None:
        self._arrays = {name: arrays.get(f"rl.{name}", np.zeros(0, dtype)) for name, dtype in _ARRAYS.items()}
        self._text_of = text_of
        self._place = self._experts_place = 0

    def _sample(self, prompt_id: int, stored: list[Any]) -> tuple[Sample, np.ndarray]:
        number, length, finish, experts_shape = stored
        part = slice(self._place, self._place + length)
        self._place += length
        tokens_S = self._arrays["tokens"][part]
        sample = Sample(
            prompt_id=prompt_id,
            sample_id=number,
            tokens_S=tokens_S,
            log_probs_S=self._arrays["log_probs"][part],
            versions_S=self._arrays["versions"][part],
            finish=finish,
            text=self._text_of(tokens_S),
            experts_WLk=self._experts(experts_shape),
        )
        return sample, self._arrays["old_log_probs"][part]

    def _experts(self, shape: Sequence[int] | None) -> np.ndarray | None:
        if shape is None:
            return None
        start = self._experts_place
        self._experts_place += math.prod(shape)
        return self._arrays["experts"][start : self._experts_place].reshape(shape)

    def started(self, stored: dict[str, Any], prompt_of: Callable[[int], Prompt]) -> Started:
        """A prompt in generation."""
        return self.unscored(stored, prompt_of).started

    def unscored(self, stored: dict[str, Any], prompt_of: Callable[[int], Prompt]) -> Unscored:
        """A complete group without scores."""
        pairs = [self._sample(stored["prompt"], one) for one in stored["samples"]]
        samples = {sample.sample_id: sample for sample, _ in pairs}
        started = Started(prompt_of(stored["prompt"]), samples, stored["window"])
        return Unscored(started, tuple(old_S for _, old_S in pairs))

    def learned(self, stored: dict[str, Any], prompt_of: Callable[[int], Prompt]) -> Learned:
        """A scored group."""
        pairs = [self._sample(stored["prompt"], one) for one in stored["samples"]]
        group = Group(
            prompt=prompt_of(stored["prompt"]),
            samples=tuple(sample for sample, _ in pairs),
            scores=tuple(Score(**score) for score in stored["scores"]),
        )
        return Learned(group, tuple(old_S for _, old_S in pairs))
