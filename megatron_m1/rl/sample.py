"""What generation hands to training: prompts, samples with their log-probabilities, scores, and groups of them.

Nothing here needs torch, because the processes that compute rewards import it.
Legend: S tokens of one sample, G samples of one group, W tokens of a prompt and an answer together, L layers, k experts
per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

FinishReason = Literal["stop", "length", "repetition"]
"""Why generation ended: the end token, the window was full, or the repetition stop."""

Failure = Literal["timeout", "error", "unavailable", "unreadable"]
"""Why a sample has no reward: it took too long, it raised, the judge was down, the judge answered nonsense."""

FAILURES: tuple[Failure, ...] = ("timeout", "error", "unavailable", "unreadable")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """One question and what is needed to judge an answer to it."""

    prompt_id: int
    """Unique in the run; seeds, the ledger of used prompts and the reward cache are keyed by it."""
    tokens_S: np.ndarray
    """int64 [S]: what the model reads."""
    text: str
    """The question as text, for judges."""
    task: str
    """Name of the reward that scores it."""
    answer: Any = None
    """What that reward needs, of JSON types: a reference answer, tests, a puzzle."""

    def __post_init__(self) -> None:
        if not len(self.tokens_S):
            raise ValueError(
                f"prompt {self.prompt_id} of task {self.task!r} has 0 tokens: a prompt has 1 or more; remove it from "
                "the prompt file"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """One generated answer; finished, or cut at an update and carried over (then it is not in a group yet)."""

    prompt_id: int
    sample_id: int
    """0..G-1 within the prompt; the seed of the sample is made of both ids."""
    tokens_S: np.ndarray
    """int64 [S]: generated tokens, the end token included."""
    log_probs_S: np.ndarray
    """fp32 [S]: log-probability, in nats, that the generating model gave each token at temperature 1, without top-p."""
    versions_S: np.ndarray
    """int32 [S]: optimizer step of the weights that generated each token; more than one value in a carried-over one."""
    finish: FinishReason | None
    """None: cut, to be carried over."""
    text: str
    """The tokens as text."""
    experts_WLk: np.ndarray | None = None
    """int8 (int16 above 128 experts) [W - 1, L, k]: experts that the routers took for every token that was read, prompt
    first; the last token was not. A row for training holds it at the positions of its inputs, as `experts_SLk`.
    None: not recorded."""

    def __post_init__(self) -> None:
        lengths = [len(self.tokens_S), len(self.log_probs_S), len(self.versions_S)]
        if len(set(lengths)) > 1 or not lengths[0]:
            raise ValueError(
                f"sample {self.sample_id} of prompt {self.prompt_id} has {lengths} tokens, log-probabilities and "
                "versions: the three must be equal and 1 or more; give one of each per generated token"
            )
        if not (np.isfinite(self.log_probs_S).all() and (self.log_probs_S <= 1e-3).all()):
            raise ValueError(
                f"sample {self.sample_id} of prompt {self.prompt_id} has log-probabilities in "
                f"[{self.log_probs_S.min()}, {self.log_probs_S.max()}]: allowed are finite ones of 0 or less; check "
                "the generation engine, which must return natural logarithms"
            )

    @property
    def oldest_version(self) -> int:
        """The oldest weights that had a part in it: what the bound on staleness looks at."""
        return int(self.versions_S.min())


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What the rewards said about one sample."""

    value: float | None
    """The reward R_i that advantages are made of; None when it failed, and then `failure` says how."""
    task_value: float | None = None
    """The task's own verdict, before format and length shaping; pass rates are made of it."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """What `value` is the sum of."""
    failure: Failure | None = None
    note: str = ""
    """For the sample table: why, in a few words."""

    def __post_init__(self) -> None:
        if (self.value is None) != (self.failure is not None):
            raise ValueError(
                f"a score has value={self.value} and failure={self.failure!r}: exactly one of them is given; a failed "
                "reward has value None and says why"
            )
        if self.value is not None and not np.isfinite(self.value):
            raise ValueError(
                f"a score has value={self.value}: allowed are finite numbers; the reward that gave it must raise "
                "instead, so that the failure is counted"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """All samples of one prompt and their scores: the scope of an advantage."""

    prompt: Prompt
    samples: tuple[Sample, ...]
    scores: tuple[Score, ...]

    def __post_init__(self) -> None:
        if not self.samples or len(self.samples) != len(self.scores):
            raise ValueError(
                f"the group of prompt {self.prompt.prompt_id} has {len(self.samples)} samples and {len(self.scores)} "
                "scores: allowed are equally many, 1 or more; score every sample before the group is made"
            )
        strangers = {sample.prompt_id for sample in self.samples} - {self.prompt.prompt_id}
        if strangers:
            raise ValueError(
                f"the group of prompt {self.prompt.prompt_id} holds samples of prompts {sorted(strangers)}: a group "
                "is of one prompt; build one group per prompt"
            )

    @property
    def rewards_G(self) -> np.ndarray:
        """fp64 [G]: rewards, NaN where the reward failed."""
        return np.array([np.nan if score.value is None else score.value for score in self.scores])


def count_failures(scores: Sequence[Score]) -> dict[str, int]:
    """How many scores failed, by kind, zeros included: a metric of every step."""
    kinds = [score.failure for score in scores]
    return {kind: kinds.count(kind) for kind in FAILURES}
