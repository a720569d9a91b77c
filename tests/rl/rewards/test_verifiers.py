"""Where answers are found, the format reward, and mathematics."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_m1.rl.rewards.answer import find_answer, last_code_block
from megatron_m1.rl.rewards.form import has_form
from megatron_m1.rl.rewards.interface import check_prompts
from megatron_m1.rl.rewards.math import MathReward
from tests.rl.make import make_prompt


@pytest.mark.parametrize(
    ("text", "place", "found"),
    [
        (r"so \boxed{1} and then \boxed{\frac{1}{2}}.", "boxed", r"\frac{1}{2}"),
        (r"<think>\boxed{3}</think> no", "boxed", None),
        (r"<think>\boxed{3}</think> \boxed{4}", "boxed", "4"),
        (r"\boxed{5} \boxed{unfinished", "boxed", "5"),
        (r"\boxed{} \boxed{ }", "boxed", None),
        ("nothing", "boxed", None),
        ("one\ntwo\n \n", "last_line", "two"),
        ("<think>a</think>\n", "last_line", None),
        ("<think>a</think> b c \n", "whole", "b c"),
        ("12", "whole", "12"),
        (" \n", "whole", None),
    ],
)
def test_the_answer_is_found_after_the_thinking(text: str, place: Any, found: str | None) -> None:
    assert find_answer(text, place) == found


def test_the_last_complete_block_of_the_language_is_the_program() -> None:
    text = "```python\na\n```\n```py\nb\nc\n```\n```cpp\nd\n```\n```python\nunfinished"
    assert last_code_block(text) == "b\nc\n"
    assert last_code_block(text, ("cpp",)) == "d\n"
    assert last_code_block("<think>\n```python\nx\n```\n</think> no code") is None


@pytest.mark.parametrize(
    ("text", "has_it"),
    [
        (r"<think>so</think> \boxed{1}", True),
        (r" <think>so</think> \boxed{1}", True),
        (r"<think>so</think> 1", False),
        (r"<think></think> \boxed{1}", False),
        (r"<think>so \boxed{1}", False),
        (r"so</think> \boxed{1}", False),
        (r"<think>a</think><think>b</think> \boxed{1}", False),
        (r"Well. <think>so</think> \boxed{1}", False),
        (r"<think>so \boxed{1}</think>", False),
    ],
)
def test_the_form_is_one_closed_thinking_block_and_an_answer(text: str, has_it: bool) -> None:
    assert has_form(text) is has_it


def test_the_prompt_may_open_the_thinking() -> None:
    assert has_form(r"so</think> \boxed{1}", opened_by_prompt=True)
    assert not has_form(r"<think>so</think> \boxed{1}", opened_by_prompt=True)


@pytest.mark.parametrize(
    ("answer", "given", "is_right"),
    [
        ("1/2", r"\frac{1}{2}", True),
        ("0.5", r"\frac{1}{2}", True),
        (12, "12", True),
        (12, "12.0", True),
        (12, "13", False),
        (r"\frac{3\sqrt{2}}{2}", r"\frac{3}{\sqrt 2}", True),
        ("(1, 2)", "(1,2)", True),
        ("(1, 2)", "(2,1)", False),
        (r"\{1, 2\}", r"\{2, 1\}", True),
        ("x^2 - 1", "(x-1)(x+1)", True),
        ("x^2 - 1", "(x-1)(x-1)", False),
        ("10\\%", "0.1", True),
        ("3", r"\{1, 2, 3\}", False),
        ("3", "1, 2, 3", False),
        ("3", "words only", False),
        ("3", "import os", False),
        ("3", "{" * 20, False),
    ],
)
def test_mathematics_is_compared_as_mathematics(answer: Any, given: str, is_right: bool) -> None:
    assert MathReward().score(make_prompt(answer=answer), rf"<think>.</think> \boxed{{{given}}}") == is_right


def test_a_text_without_an_answer_is_wrong() -> None:
    assert MathReward().score(make_prompt(answer="3"), "It is 3.") == 0.0
    assert MathReward(place="whole").score(make_prompt(answer="3"), "3") == 1.0


def test_prompts_are_checked_before_anything_is_generated() -> None:
    rewards = {"math": MathReward()}
    check_prompts([make_prompt(answer="1"), make_prompt(answer=r"\pi")], rewards)
    for answer in (None, "", " ", True, [1], {"value": 1}):
        with pytest.raises(
            ValueError, match=r"prompt 4 of task 'math' has answer .*: allowed is a number or"
        ):
            check_prompts([make_prompt(4, answer=answer)], rewards)
    with pytest.raises(ValueError, match="can parse as mathematics"):
        check_prompts([make_prompt(answer="???")], rewards)
    with pytest.raises(ValueError, match="task 'maths', which has no reward: did you mean 'math'"):
        check_prompts([make_prompt(task="maths")], rewards)
