"""The exact reward: the answer is these items, in this order. For tasks that are made by rule."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_m1.rl.rewards.answer import AnswerPlace, find_answer
from megatron_m1.rl.rewards.interface import Reward, bad_answer
from megatron_m1.rl.sample import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactReward(Reward):
    """1 when the answer, split at white space, is the list of items in `prompt.answer`; 0 otherwise."""

    place: AnswerPlace = "whole"
    """Where the answer is looked for."""
    timeout_s: float = 10.0

    def check_prompt(self, prompt: Prompt) -> None:
        answer = prompt.answer
        is_list = isinstance(answer, list) and bool(answer)
        if not is_list or not all(
            isinstance(item, str) and item and not any(map(str.isspace, item)) for item in answer
        ):
            raise bad_answer(prompt, "a list of 1 or more words without spaces")

    def score(self, prompt: Prompt, text: str) -> float:
        found = find_answer(text, self.place)
        return float(found is not None and found.split() == prompt.answer)
