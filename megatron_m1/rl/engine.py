"""The trainer's own model as the engine of rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_m1.rl.config import RLConfig
from megatron_m1.rl.generate import GenerationConfig, Generator, Request
from megatron_m1.rl.sample import Sample
from parallel.groups import Groups


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnEngine:
    """Generates under the training layout, always by the newest weights."""

    chunks: Sequence[Any]
    groups: Groups
    config: RLConfig
    seed: int
    end_token: int
    text_of: Callable[[np.ndarray], str]

    def generate(
        self, requests: Sequence[Request], *, window: int, version: int, max_passes: int | None
    ) -> list[Sample]:
        """See `rollout.Engine`."""
        settings = drawing_of(self.config, window=window, end_token=self.end_token, seed=self.seed)
        generator = Generator(self.chunks, self.groups, settings, version=version, text_of=self.text_of)
        return generator.run(requests, max_passes=max_passes)

    def metrics(self) -> dict[str, float]:
        """Nothing: weights need no way, and no request is lost."""
        return {}


def drawing_of(config: RLConfig, *, window: int, end_token: int, seed: int) -> GenerationConfig:
    """How samples are drawn under a window of prompt and answer, in tokens."""
    rollout = config.rollout
    return GenerationConfig(
        window=window,
        end_token=end_token,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        seed=seed,
        slots=rollout.slots,
        prefill_tokens=rollout.prefill_tokens,
        repetition=config.repetition,
        record_experts=rollout.replay_experts,
    )
