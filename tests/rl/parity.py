"""Rewards for tests of the loop, in a module that the processes of the pool can import."""

from __future__ import annotations

import time
from dataclasses import dataclass

from megatron_m1.rl.rewards.interface import Reward
from megatron_m1.rl.sample import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReward(Reward):
    """1 for an even first token; with a number as the prompt's answer, raises or hangs instead."""

    timeout_s: float = 1.0

    def check_prompt(self, prompt: Prompt) -> None:
        """Any prompt will do."""

    def score(self, prompt: Prompt, text: str) -> float:
        if prompt.answer == "raise":
            raise KeyError("this reward is broken")
        if prompt.answer == "hang":
            time.sleep(60)
        return float(int(text.split()[0]) % 2 == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingReward(ParityReward):
    """Not ready."""

    def prepare(self) -> None:
        raise RuntimeError("the judge at 127.0.0.1:9 does not answer")
