"""Rollouts with a real model and real rewards: refill, cut samples, lag, staleness, and the ledger of prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from megatron_m1.rl.config import RLConfig, RolloutConfig
from megatron_m1.rl.engine import OwnEngine
from megatron_m1.rl.mismatch import MismatchConfig, MismatchError
from megatron_m1.rl.prompts import PromptBook
from megatron_m1.rl.queue import Queue
from megatron_m1.rl.rewards.overlong import OverlongConfig
from megatron_m1.rl.rewards.pool import PoolConfig
from megatron_m1.rl.rewards.scorer import ScoringConfig
from megatron_m1.rl.rollout import Rollouts
from megatron_m1.rl.sample import Prompt, Sample
from megatron_m1.rl.scoring import Scoring
from megatron_m1.rl.stop import RepetitionConfig
from megatron_m1.rl.update import Policy
from megatron_m1.rl.window import WindowConfig
from megatron_m1.training.step import wrap_for_gradients
from tests.rl import generate_ranks as ranks
from tests.rl.parity import MissingReward, ParityReward

WINDOW = 40


def config(*, rollout: dict[str, Any] | None = None, **changes: Any) -> RLConfig:
    options: dict[str, Any] = {
        "group_size": 3,
        "groups_per_batch": 4,
        "updates_per_batch": 2,
        "window": WindowConfig(stages_tokens=(WINDOW,)),
        "rollout": RolloutConfig(**{"slots": 6, **(rollout or {})}),
        "pool": PoolConfig(workers=1),
        "scoring": ScoringConfig(format_weight=0.0, overlong=OverlongConfig(weight=0.0)),
        "repetition": RepetitionConfig(tokens=0),
    }
    return RLConfig(**(options | changes))


def book(count: int = 40, answer: Any = None) -> PromptBook:
    random = np.random.default_rng(5)
    prompts = [
        Prompt(prompt_id=n, tokens_S=random.integers(1, 64, 1 + n % 9), text="", task="parity", answer=answer)
        for n in range(count)
    ]
    return PromptBook({"parity": prompts}, lambda task, number, size: lambda place: (place + number) % size)


def text_of(tokens_S: np.ndarray) -> str:
    return " ".join(map(str, tokens_S))


@pytest.fixture(scope="module")
def model(alone):
    chunks = ranks.build(alone)
    return chunks, wrap_for_gradients(chunks, alone), alone


@contextmanager
def rollouts(model: Any, rl: RLConfig, prompts: PromptBook, queue: Queue) -> Iterator[Rollouts]:
    chunks, wrapped, groups = model
    policy = Policy(wrapped=wrapped, groups=groups, row_tokens=64, micro_batch=1)
    engine = OwnEngine(chunks=chunks, groups=groups, config=rl, seed=3, end_token=ranks.END, text_of=text_of)
    with Scoring({"parity": ParityReward()}, rl.pool, rl.scoring, queue.scores) as scoring:
        yield Rollouts(rl, prompts, queue, engine, scoring, policy.log_probs)


def learn(rolls: Rollouts, queue: Queue) -> list[int]:
    """Use up the batch; the prompts that were learnt from."""
    used, queue.batch, queue.updates_left = queue.batch, [], 0
    rolls.learnt_from(used)
    return [one.group.prompt.prompt_id for one in used]


def assert_each_prompt_is_in_one_place(prompts: PromptBook, queue: Queue) -> None:
    assert sum(prompts.taken.values()) == queue.fates.total + queue.in_flight, queue.fates.counts
    ids = [
        *(one.prompt.prompt_id for one in queue.running),
        *(one.started.prompt.prompt_id for one in queue.unscored),
        *(one.group.prompt.prompt_id for one in [*queue.ready, *queue.batch]),
    ]
    assert len(set(ids)) == len(ids), ids


def test_a_batch_is_refilled_until_it_has_its_groups_and_all_of_them_teach(model) -> None:
    prompts, queue = book(), Queue()
    with rollouts(model, config(), prompts, queue) as rolls:
        seen = rolls.next_batch(version=7)
        assert len(queue.batch) == 4 and queue.updates_left == 2
        assert all(np.ptp(one.group.rewards_G) > 0 for one in queue.batch)
        assert seen.rounds > 1, "a quarter of the groups of three agree: one round cannot do"
        dropped = queue.fates.counts["all_solved"] + queue.fates.counts["none_solved"]
        assert dropped == len(seen.groups) - len(queue.batch) - len(queue.ready) > 0
        # the whole-sequence forward agrees with generation, token by token
        found = seen.mismatch()
        assert found.num_tokens > 100 and found.correlation > 0.9999 and found.nats[2] < 1e-3, found
        assert_each_prompt_is_in_one_place(prompts, queue)


def test_cut_samples_are_carried_on_with_the_version_of_each_token(model) -> None:
    rl, prompts, queue = config(rollout={"passes_per_round": 10}, most_rounds=3), book(), Queue()
    versions: set[tuple[int, ...]] = set()
    carried, learnt = 0, []
    with rollouts(model, rl, prompts, queue) as rolls:
        for version in (0, 2, 4, 6):
            carried += rolls.next_batch(version).carried
            assert_each_prompt_is_in_one_place(prompts, queue)
            for one in queue.batch:
                for sample in one.group.samples:
                    assert (np.diff(sample.versions_S) >= 0).all() and sample.oldest_version >= version - 4
                    versions.add(tuple(sorted(set(sample.versions_S.tolist()))))
            learnt += learn(rolls, queue)
    assert carried > 0 and max(map(len, versions)) > 1, versions
    assert len(set(learnt)) == len(learnt) > 1


def test_one_step_off_learns_from_what_older_weights_generated_while_they_were_newest(model) -> None:
    rl, prompts, queue = config(rollout={"lag_batches": 1, "max_staleness_batches": 1}), book(), Queue()
    ages = []
    with rollouts(model, rl, prompts, queue) as rolls:
        for version in (0, 2, 4, 6):
            rolls.next_batch(version)
            assert queue.unscored, "the next batch is being scored while this one is learnt from"
            ages.append([version - one.oldest_version for one in queue.batch])
            assert_each_prompt_is_in_one_place(prompts, queue)
            learn(rolls, queue)
    assert set(ages[0]) == {0}
    # one batch is two updates: that is the lag, and the bound
    assert all(set(batch) <= {0, 2} for batch in ages) and sum(2 in batch for batch in ages) > 1, ages


def test_what_waited_too_long_is_generated_anew_or_dropped_and_counted(model) -> None:
    rl = config(rollout={"passes_per_round": 6, "max_staleness_batches": 0}, most_rounds=3)
    prompts, queue = book(), Queue()
    restarted = 0
    with rollouts(model, rl, prompts, queue) as rolls:
        for version in (0, 2, 4, 6):
            restarted += rolls.next_batch(version).restarted
            assert all(one.oldest_version == version for one in queue.batch)
            assert_each_prompt_is_in_one_place(prompts, queue)
            learn(rolls, queue)
    assert restarted > 0


@pytest.mark.parametrize("lag", [0, 1])
def test_a_stored_queue_goes_on_as_if_nothing_had_happened(model, lag: int) -> None:
    rl = config(rollout={"passes_per_round": 9, "lag_batches": lag}, most_rounds=3)

    def go_on(prompts: PromptBook, queue: Queue, versions: range) -> str:
        with rollouts(model, rl, prompts, queue) as rolls:
            for version in versions:
                rolls.next_batch(2 * version)
                learn(rolls, queue)
        about, arrays = queue.dump(prompts.taken, prompts.identity())
        about.pop("scores")
        return json.dumps([about, {name: array.tolist() for name, array in arrays.items()}])

    whole_book, whole = book(), Queue()
    expected = go_on(whole_book, whole, range(4))
    first_book, first = book(), Queue()
    go_on(first_book, first, range(2))
    about, arrays = first.dump(first_book.taken, first_book.identity())
    assert first.running, "nothing was cut"
    second_book = book()
    second_book.taken = about["taken"]
    stored = json.loads(json.dumps(about))
    second = Queue.load(stored, {k: v for k, v in arrays.items() if v.size}, second_book.by_id, text_of)
    _assert_same_samples(first, second)
    assert go_on(second_book, second, range(2, 4)) == expected


def _assert_same_samples(first: Queue, second: Queue) -> None:
    def samples(queue: Queue) -> list[Sample]:
        unscored = [one.started for one in queue.unscored]
        started = [
            one.samples[number] for one in [*queue.running, *unscored] for number in sorted(one.samples)
        ]
        return [*started, *(sample for one in queue.ready for sample in one.group.samples)]

    assert len(samples(first)) == len(samples(second)) > 0
    for ours, theirs in zip(samples(first), samples(second), strict=True):
        assert (ours.prompt_id, ours.sample_id, ours.finish) == (
            theirs.prompt_id,
            theirs.sample_id,
            theirs.finish,
        )
        assert ours.text == theirs.text
        for name in ("tokens_S", "log_probs_S", "versions_S"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)


def test_prompts_without_signal_end_in_an_empty_batch_that_is_counted(model) -> None:
    rl = config(most_rounds=1, group_size=2, groups_per_batch=2)
    prompts = book(answer="raise")
    queue = Queue()
    lenient = ScoringConfig(format_weight=0.0, most_failed_share=1.0)
    with rollouts(
        model, RLConfig(**{f: getattr(rl, f) for f in rl.__slots__} | {"scoring": lenient}), prompts, queue
    ) as r:
        r.next_batch(0)
    assert queue.updates_left == 0 and not queue.batch
    assert queue.fates.counts["unscored"] == sum(prompts.taken.values()) > 0


@pytest.mark.parametrize(("answer", "kind"), [("raise", "error"), ("hang", "timeout")])
def test_a_reward_that_raises_or_hangs_ends_the_run_with_its_count(model, answer: str, kind: str) -> None:
    prompts, queue = book(answer=answer), Queue()
    rl = config(most_rounds=1, group_size=2, groups_per_batch=2, updates_per_batch=1)
    with (
        rollouts(model, rl, prompts, queue) as rolls,
        pytest.raises(RuntimeError, match=rf"4 of 4 samples have no reward.*'{kind}': 4.*most_failed_share"),
    ):
        rolls.next_batch(0)


def test_a_reward_that_is_not_ready_ends_the_run_before_anything_is_generated(alone) -> None:
    with pytest.raises(ValueError, match="a reward is not ready.*127.0.0.1:9 does not answer.*task 'parity'"):
        Scoring({"parity": MissingReward()}, PoolConfig(workers=1), ScoringConfig(), {})


def test_an_engine_with_other_weights_ends_the_run(model) -> None:
    chunks, wrapped, groups = model
    rl, prompts, queue = config(mismatch=MismatchConfig(most_p99_nats=0.01)), book(), Queue()
    policy = Policy(wrapped=wrapped, groups=groups, row_tokens=64, micro_batch=1)
    engine = OwnEngine(chunks=chunks, groups=groups, config=rl, seed=3, end_token=ranks.END, text_of=text_of)

    def older(asked: Any) -> list[np.ndarray]:
        return [values - 0.02 for values in policy.log_probs(asked)]

    with Scoring({"parity": ParityReward()}, rl.pool, rl.scoring, queue.scores) as scoring:
        rolls = Rollouts(rl, prompts, queue, engine, scoring, older)
        with pytest.raises(MismatchError, match=r"99 % within 0.0200 nats; allowed are.*0.01 nats"):
            rolls.next_batch(0)
