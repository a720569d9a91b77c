"""What a reward is: it looks at a prompt's answer once, and then says a number for every text.

A reward runs in a process of its own (`pool.py`), so it must be picklable, and it may be killed. It either returns a
number or raises; it never turns its own trouble into a 0.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

from megatron_m1.rl.sample import Prompt


class JudgeUnavailable(Exception):
    """A judge could not be asked: it is down, slow or refuses. Counted as "unavailable"."""


class JudgeUnreadable(Exception):
    """A judge answered, but not with a verdict. Counted as "unreadable"."""


class Reward(ABC):
    """Scores texts for the prompts of one task."""

    timeout_s: float = 30.0
    """Wall seconds that one text may take; then its process is killed and the failure counted as "timeout"."""

    verifies: bool = True
    """Whether rules decide; a judge does not verify, and its verdicts are watched for a bias to length."""

    verdict_range: tuple[float, float] = (0.0, 1.0)
    """The least and the highest verdict."""

    def prepare(self) -> None:  # noqa: B027 - most rewards need nothing
        """Prove once, before the run, that what this reward needs is there.

        Raises:
            Exception: it is not, and what is missing.
        """

    @abstractmethod
    def check_prompt(self, prompt: Prompt) -> None:
        """Look at what the prompt brings, before anything is generated for it.

        Raises:
            ValueError: it has no answer, or none that this reward can use.
        """

    @abstractmethod
    def score(self, prompt: Prompt, text: str) -> float:
        """The verdict on one generated text; 1 is solved and 0 is not, unless the reward says otherwise.

        `prompt.tokens_S` is not sent to the process that runs this: it is one zero.

        Raises:
            JudgeUnavailable, JudgeUnreadable: counted under their own names. Anything else is counted as "error".
        """


def bad_answer(prompt: Prompt, allowed: str) -> ValueError:
    """The error of a prompt that a reward cannot use."""
    got = repr(prompt.answer)
    got = got if len(got) <= 80 else got[:77] + "..."
    return ValueError(
        f"prompt {prompt.prompt_id} of task {prompt.task!r} has answer {got}: allowed is {allowed}; correct the prompt "
        "file or give the prompt to another task"
    )


def check_rewards(rewards: Mapping[str, Reward]) -> None:
    """Prepare every reward, so that a missing sandbox or judge ends a run before it has begun.

    Raises:
        Exception: of the first reward that is not ready, with the task's name added.
    """
    for task, reward in rewards.items():
        try:
            reward.prepare()
        except Exception as error:
            error.add_note(f"this is the reward of task {task!r}")
            raise


def check_prompts(prompts: Iterable[Prompt], rewards: Mapping[str, Reward]) -> None:
    """Check every prompt before the run, so that a bad one costs no generation.

    Raises:
        ValueError: the first prompt whose task has no reward, or whose answer its reward cannot use.
    """
    for prompt in prompts:
        if prompt.task not in rewards:
            near = difflib.get_close_matches(prompt.task, rewards, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"prompt {prompt.prompt_id} is of task {prompt.task!r}, which has no reward: {hint}allowed are "
                f"{', '.join(sorted(rewards))}; rename the task or configure its reward"
            )
        rewards[prompt.task].check_prompt(prompt)
