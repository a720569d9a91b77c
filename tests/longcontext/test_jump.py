"""An explosion of gradients is told from noise, named by layer, and survives a resume in the middle of the watch."""

from __future__ import annotations

import json
import math
import re

import pytest

from megatron_m1.longcontext.jump import Explosion, JumpWatch, LengthJumpConfig
from megatron_m1.longcontext.pictures import growth_picture

PARTS = ("lightning 0", "experts 0", "softmax 1")


def watch(saved=None, *, stage="long", is_jump=True, **settings) -> JumpWatch:
    return JumpWatch(LengthJumpConfig(**settings), stage, PARTS, is_jump=is_jump, saved=saved)


def state_before(norms=(1.0,) * 10) -> dict:
    """State at the end of a stage whose whole norms these were; its parts had 0.5, 0.1 and 0.2."""
    before = watch(stage="short", is_jump=False)
    for step, norm in enumerate(norms):
        assert before.saw(step, norm, [0.5, 0.1, 0.2], was_made=True) is None
    return json.loads(json.dumps(before.state))


def feed(one: JumpWatch, *norms: float, was_made: bool = True) -> list[Explosion | None]:
    return [one.saw(100 + i, norm, [0.5, 0.3, 20.0], was_made=was_made) for i, norm in enumerate(norms)]


def test_steps_in_a_row_above_five_times_an_even_stage_explode():
    # an even stage: the spread counts as 0.2, so the limit is e^(8 * 0.2) = 4.953 times the median
    assert feed(watch(state_before()), 4.9, 4.9, 4.9, 4.9) == [None] * 4
    assert feed(watch(state_before()), 5.0, 5.0, 1.0, 5.0, 5.0) == [None] * 5
    *quiet, explosion = feed(watch(state_before()), 5.0, 5.0, 5.0)
    assert quiet == [None, None]
    assert explosion == Explosion(
        step=102,
        grad_norm=5.0,
        usual_norm=1.0,
        steps_in_a_row=3,
        growth={"lightning 0": 1.0, "experts 0": pytest.approx(3.0), "softmax 1": pytest.approx(100.0)},
    )
    assert explosion.sentences()[1].startswith("most grown: softmax 1 x 100, experts 0 x 3, lightning 0 x 1")


def test_a_noisy_stage_before_allows_more_and_one_wild_step_in_it_changes_nothing():
    # logs 0, 1 and -1 in turn: median 0, median distance 1, so the limit is e^(8 * 1.4826) = 141,492
    noisy = [math.exp(i % 3 - 1) for i in range(30)]
    assert feed(watch(state_before(noisy)), 1.4e5, 1.4e5, 1.4e5) == [None] * 3
    assert feed(watch(state_before(noisy)), 1.5e5, 1.5e5, 1.5e5)[-1] is not None
    assert feed(watch(state_before([1.0] * 9 + [1e6])), 5.0, 5.0, 5.0)[-1] is not None


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_what_is_no_number_counts_as_above_the_limit(norm):
    explosion = feed(watch(state_before()), norm, norm, norm)[-1]
    assert explosion is not None
    one = watch(state_before())
    assert [one.saw(i, norm, [0.5, norm, 0.2], was_made=True) for i in range(2)] == [None, None]
    explosion = one.saw(2, norm, [0.5, norm, 0.2], was_made=True)
    assert explosion is not None and explosion.growth["experts 0"] == math.inf
    json.dumps(one.state, allow_nan=False)


def test_refused_steps_count_as_above_the_limit():
    assert feed(watch(state_before()), 1.0, 1.0, 1.0, was_made=False)[-1] is not None


@pytest.mark.parametrize(
    "one",
    [
        watch(state_before(), is_jump=False),
        watch(state_before(), sigmas=0.0),
        watch(state_before([1.0] * 7)),
        watch(None),
    ],
    ids=["no jump", "switched off", "too few norms before", "nothing before"],
)
def test_what_is_not_watched(one):
    assert feed(one, 1e9, 1e9, 1e9, 1e9) == [None] * 4


def test_the_watch_ends_after_its_steps():
    one = watch(state_before(), watch_steps=5)
    assert feed(one, 1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 9.0) == [None] * 7


def test_a_resume_in_the_middle_goes_on_with_the_same_count():
    one = watch(state_before())
    assert feed(one, 1.0, 6.0, 6.0) == [None] * 3
    resumed = watch(json.loads(json.dumps(one.state)))
    assert feed(resumed, 6.0)[0] is not None


def test_steps_above_the_limit_are_not_the_measure_of_the_next_stage():
    one = watch(state_before(), patience_steps=50)
    feed(one, *[2.0] * 12, *[1e4] * 20)
    assert {entry[0] for entry in one.state["recent"]} == {2.0}
    assert feed(watch(one.state, stage="longer"), 11.0, 11.0, 11.0)[-1] is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigmas": -1.0}, "length_jump.sigmas=-1.0 is not a limit.*0 to watch nothing"),
        ({"patience_steps": 0}, "length_jump.patience_steps=0 is too few: it must be 1 or more"),
        ({"window_steps": 3}, "length_jump.window_steps=3 is too few: it must be 8 or more"),
        ({"answer": "panic"}, "length_jump.answer='panic' is unknown: choose from insert, lower_rate"),
        ({"rate_factor": 0.0}, "length_jump.rate_factor=0.0 is no share: it must be above 0 and at most 1"),
        ({"token_share": 1.5}, "length_jump.token_share=1.5 is no share"),
        ({"most_answers": 0}, "length_jump.most_answers=0 allows no answer.*answer=stop"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        LengthJumpConfig(**settings)


def test_the_picture_of_an_explosion_is_written(tmp_path):
    growth = {"embedding": 3.0, "lightning 0": 2.0, "experts 0": math.inf, "softmax 1": 500.0, "head": 1.0}
    explosion = Explosion(step=3, grad_norm=9.0, usual_norm=1.0, steps_in_a_row=3, growth=growth)
    growth_picture(explosion, "test", tmp_path / "jump.png")
    assert (tmp_path / "jump.png").read_bytes().startswith(b"\x89PNG")
