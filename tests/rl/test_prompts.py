"""Prompts: each is used once per pass and under one id, files are read strictly, and bad ones cost no generation."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.permute import KeyedPermutation
from megatron_m1.config import load_run
from megatron_m1.reinforcement import open_prompts
from megatron_m1.rl.mismatch import MismatchConfig, MismatchError, check, measure
from megatron_m1.rl.prompts import PromptBook, PromptSource, read_questions
from megatron_m1.rl.rewards.exact import ExactReward
from megatron_m1.rl.sample import Prompt
from megatron_m1.stages import stages_of
from tests.rl.make import make_prompt
from tests.rl.tiny_rl import write_run_file, write_tokenizer


def book(**sizes: int) -> PromptBook:
    by_task: dict[str, list[Prompt]] = {}
    for task, size in sizes.items():
        first = sum(map(len, by_task.values()))
        by_task[task] = [make_prompt(first + n, task=task, text=f"{task} {n}") for n in range(size)]
    return PromptBook(
        by_task, lambda task, number, size: KeyedPermutation(size, hash((task, number)) % 2**60)
    )


def test_every_prompt_comes_once_per_pass_in_another_order_and_under_another_id() -> None:
    prompts = book(a=7, b=5)
    taken = [prompts.take("a") for _ in range(21)] + [prompts.take("b") for _ in range(5)]
    passes = [[p.text for p in taken[start : start + 7]] for start in (0, 7, 14)]
    assert all(Counter(texts) == Counter(passes[0]) and len(set(texts)) == 7 for texts in passes)
    assert passes[0] != passes[1] != passes[2]
    ids = [p.prompt_id for p in taken]
    assert len(set(ids)) == len(ids)
    for prompt in taken:
        again = prompts.by_id(prompt.prompt_id)
        assert (again.text, again.task, again.prompt_id) == (prompt.text, prompt.task, prompt.prompt_id)
    assert prompts.taken == {"a": 21, "b": 5}


def test_the_ledger_is_one_count_per_task() -> None:
    whole, first, second = book(a=9), book(a=9), book(a=9)
    expected = [whole.take("a").prompt_id for _ in range(13)]
    found = [first.take("a").prompt_id for _ in range(6)]
    second.taken = dict(first.taken)
    assert found + [second.take("a").prompt_id for _ in range(7)] == expected


def test_a_task_without_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="rl source 'b' has 0 prompts: it needs 1 or more"):
        book(a=3, b=0)


def test_books_with_other_texts_are_told_apart() -> None:
    assert book(a=3).identity() == book(a=3).identity() != book(a=4).identity()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1, 2]", "line 2 of .* is '\\[1, 2\\]'"),
        ('{"question": "?"}', 'each is an object with a "prompt"'),
        ('{"prompt": ""}', "that is not empty"),
        ('{"prompt": "2 + 2', "correct the line"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "1 + 1 =", "answer": "2"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        list(read_questions(PromptSource(name="sums", path=str(path), reward="math")))


def test_a_line_ends_at_its_newline_and_not_at_a_separator_within_a_text(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one\u2028two\u0085three", "answer": "1"}\n\n', encoding="utf-8")
    (question,) = read_questions(PromptSource(name="sums", path=str(path), reward="math"))
    assert question.text == "one\u2028two\u0085three"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "x", "path": "p.jsonl"}, "is a file and has no reward"),
        ({"name": "x", "kind": "logic", "task": "sudoko"}, "the families are"),
        ({"name": "x", "path": "p.jsonl", "reward": "grade"}, "grade and pairwise have a judge"),
        ({"name": "x", "kind": "synthetic", "path": "p.jsonl"}, "a file has a path and no task"),
    ],
)
def test_a_source_that_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptSource(**options)


def test_prompts_without_an_answer_for_their_reward_end_the_run_before_generation(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.json")
    lines = [{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "2 + 2 ="}]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = write_run_file(tmp_path / "run", tmp_path / "tokenizer.json")
    source = {"name": "sums", "kind": "file", "path": str(tmp_path / "sums.jsonl"), "reward": "math"}

    def opened(**changes: str) -> PromptBook:
        config = load_run(text, [f"rl.sources=[{json.dumps(source | changes)}]"])
        return open_prompts(stages_of(config)[-1])

    with pytest.raises(
        ValueError, match="prompt 1 of task 'sums' has answer None: allowed is a number or a LaTeX"
    ):
        opened()
    lines[1]["answer"] = "4"
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert opened().sizes == {"sums": 2}
    (tmp_path / "sums.jsonl").write_text(json.dumps({"prompt": "long " * 60, "answer": "4"}))
    with pytest.raises(ValueError, match=r"of rl source 'sums' has \d+ tokens: a window of 44 tokens"):
        opened()


def test_the_exact_reward_wants_all_items_in_their_order() -> None:
    reward, prompt = ExactReward(), make_prompt(answer=["kelp", "iris"])
    reward.check_prompt(prompt)
    assert reward.score(prompt, " kelp iris\n") == 1.0
    for wrong in ("", "iris kelp", "kelp", "kelp iris iris", "kelp, iris", "kelpiris"):
        assert reward.score(prompt, wrong) == 0.0, wrong
    for answer in (None, [], "kelp", ["kelp iris"], [""], [3]):
        with pytest.raises(ValueError, match="a list of 1 or more words"):
            reward.check_prompt(make_prompt(answer=answer))


def test_mismatch_is_correlation_and_distance() -> None:
    random = np.random.default_rng(0)
    trained = -random.exponential(1.0, 1000).astype(np.float32)
    same = measure(trained, trained)
    assert same.correlation == pytest.approx(1.0) and same.nats == (0.0, 0.0, 0.0)
    check(same, MismatchConfig())
    # probabilities 0.5 and 0.25 on one side, 0.4 and 0.3 on the other: a straight line through two points
    two = measure(np.log([0.5, 0.25]), np.log([0.4, 0.3]))
    assert two.correlation == pytest.approx(1.0) and two.nats[2] == pytest.approx(np.log(0.5 / 0.4))
    # constant probabilities have no correlation: the distance decides
    flat = measure(np.full(100, -3.0), np.full(100, -3.0))
    assert flat.correlation == 1.0
    shuffled = measure(trained, random.permutation(trained))
    with pytest.raises(
        MismatchError, match=r"disagree on 1000 tokens: correlation .*rl.mismatch.least_correlation"
    ):
        check(shuffled, MismatchConfig(most_p99_nats=100.0))
    check(shuffled, MismatchConfig(least_correlation=-1.0, most_p99_nats=100.0))
    check(measure(trained[:10], trained[:10] - 5), MismatchConfig())
    with pytest.raises(MismatchError):
        check(measure(trained, np.where(trained < -2, np.nan, trained)), MismatchConfig())
