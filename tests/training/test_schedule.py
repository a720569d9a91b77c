"""The schedule reproduces MiniMax-01's published recipe and refuses what it cannot mean."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_m1.training.schedule import (
    BatchStage,
    Plateau,
    ScheduleConfig,
    check_batch_ramp,
    global_batch_samples,
    learning_rate,
    tokens_after_steps,
)

MILLION = 2**20
BILLION = 10**9
TRILLION = 10**12
# 500 steps of 16 * 2**20 tokens: the warm-up lies inside the first stage of the ramp.
WARMUP_TOKENS = 8_388_608_000

MINIMAX_01 = ScheduleConfig(
    peak_learning_rate=2e-4,
    min_learning_rate=3e-5,
    warmup_steps=500,
    constant_tokens=7_200 * BILLION,
    plateaus=(Plateau(learning_rate=1.3e-4, tokens=3_200 * BILLION),),
    decay="exponential",
    decay_tokens=1 * TRILLION,
    batch_ramp=(
        BatchStage(from_tokens=0, global_batch_tokens=16 * MILLION),
        BatchStage(from_tokens=69 * BILLION, global_batch_tokens=32 * MILLION),
        BatchStage(from_tokens=790 * BILLION, global_batch_tokens=64 * MILLION),
        BatchStage(from_tokens=4_700 * BILLION, global_batch_tokens=128 * MILLION),
    ),
)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 4e-7), (1, 8e-7), (249, 1e-4), (498, 1.996e-4), (499, 2e-4), (500, 2e-4)],
)
def test_minimax_01_warms_up_over_500_steps(step: int, expected: float) -> None:
    assert learning_rate(MINIMAX_01, step, step * 16 * MILLION) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("tokens_after_warmup", "expected"),
    [
        (7_200 * BILLION - 1, 2e-4),
        (7_200 * BILLION, 1.3e-4),
        (10_400 * BILLION, 1.3e-4),
        # 1.3e-4 * (3/13)^(1/4), sqrt(1.3e-4 * 3e-5) and the floor
        (10_650 * BILLION, 9.010270e-5),
        (10_900 * BILLION, 6.244998e-5),
        (11_400 * BILLION, 3e-5),
        (15_000 * BILLION, 3e-5),
    ],
)
def test_minimax_01_holds_drops_and_decays_exponentially(tokens_after_warmup: int, expected: float) -> None:
    rate = learning_rate(MINIMAX_01, 200_000, WARMUP_TOKENS + tokens_after_warmup)
    assert rate == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("consumed_tokens", "expected_samples"),
    [
        (0, 2048),
        (69 * BILLION - 1, 2048),
        (69 * BILLION, 4096),
        (790 * BILLION - 1, 4096),
        (790 * BILLION, 8192),
        (4_700 * BILLION - 1, 8192),
        (4_700 * BILLION, 16384),
        (11_400 * BILLION, 16384),
    ],
)
def test_minimax_01_doubles_its_batch_three_times(consumed_tokens: int, expected_samples: int) -> None:
    assert global_batch_samples(MINIMAX_01, consumed_tokens, 8192, multiple=512) == expected_samples


def test_m1_continual_pretraining_halfway_down_a_linear_decay() -> None:
    config = ScheduleConfig(
        peak_learning_rate=8e-5, min_learning_rate=8e-6, constant_tokens=2_500 * BILLION,
        decay="linear", decay_tokens=5 * TRILLION,
    )  # fmt: skip
    assert learning_rate(config, 0, 2_500 * BILLION - 1) == 8e-5
    assert learning_rate(config, 0, 5 * TRILLION) == pytest.approx(4.4e-5, rel=1e-12)
    assert learning_rate(config, 0, 8 * TRILLION) == pytest.approx(8e-6, rel=1e-12)


def test_cosine_in_steps_after_warmup_steps() -> None:
    config = ScheduleConfig(
        peak_learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=10, decay="cosine", decay_steps=100
    )
    # cos(pi/4) = 0.70710678: 1e-4 + 9e-4 * 0.85355339
    expected = {0: 1e-4, 9: 1e-3, 10: 1e-3, 35: 8.681981e-4, 60: 5.5e-4, 110: 1e-4, 500: 1e-4}
    for step, rate in expected.items():
        assert learning_rate(config, step, 0) == pytest.approx(rate, rel=1e-6), step


def test_warmup_in_tokens_counts_the_batch_about_to_be_taken() -> None:
    config = ScheduleConfig(
        peak_learning_rate=1e-3,
        warmup_tokens=400,
        batch_ramp=(BatchStage(from_tokens=0, global_batch_tokens=100),),
    )
    rates = [learning_rate(config, 0, tokens) for tokens in (0, 100, 300, 10_000)]
    assert rates == pytest.approx([2.5e-4, 5e-4, 1e-3, 1e-3])


def test_tokens_after_steps_crosses_a_stage_only_at_a_step_border() -> None:
    config = ScheduleConfig(
        batch_ramp=(
            BatchStage(from_tokens=0, global_batch_tokens=10),
            BatchStage(from_tokens=25, global_batch_tokens=20),
        )
    )
    # The third step starts at 20 tokens, still in the first stage, and ends at 30.
    assert [tokens_after_steps(config, steps) for steps in range(6)] == [0, 10, 20, 30, 50, 70]


@given(
    batches=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    gaps=st.lists(st.integers(1, 60), min_size=3, max_size=3),
    num_steps=st.integers(0, 60),
)
def test_tokens_after_steps_equals_taking_the_steps(
    batches: list[int], gaps: list[int], num_steps: int
) -> None:
    starts = [0, gaps[0], gaps[0] + gaps[1], sum(gaps)]
    stages = list(zip(starts, batches, strict=False))
    ramp = tuple(BatchStage(from_tokens=start, global_batch_tokens=batch) for start, batch in stages)
    consumed = 0
    for _ in range(num_steps):
        consumed += [batch for start, batch in stages if start <= consumed][-1]
    assert tokens_after_steps(ScheduleConfig(batch_ramp=ramp), num_steps) == consumed


def test_a_batch_that_the_layout_cannot_hold_is_refused_not_rounded() -> None:
    config = ScheduleConfig(batch_ramp=(BatchStage(from_tokens=0, global_batch_tokens=10_000),))
    with pytest.raises(ValueError, match=r"10000 tokens .* not a multiple of 4096 .*: choose 8192 or 12288"):
        check_batch_ramp(config, sequence_length=1024, multiple=4)
    assert global_batch_samples(config, 0, sequence_length=1000, multiple=5) == 10


REFUSED = [
    ({"decay": "exponential", "decay_tokens": 10}, "min_learning_rate=0.0 with an exponential decay"),
    ({"decay": "linear"}, "needs a positive length"),
    ({"decay_steps": 5}, "'none' takes no length"),
    ({"decay": "square", "decay_steps": 5}, "not a known shape: choose from none, linear"),
    ({"constant_steps": 5, "decay": "linear", "decay_tokens": 5}, "mixes units"),
    ({"warmup_tokens": 5, "decay": "linear", "decay_steps": 5}, "mixes units"),
    ({"warmup_tokens": 5, "warmup_steps": 5}, "one warm-up is allowed"),
    ({"decay": "linear", "decay_steps": 5, "min_learning_rate": 1.0}, r"outside 0 to 0\.0002"),
    ({"peak_learning_rate": 0.0}, "positive finite number"),
    ({"warmup_steps": -1}, "0 or more"),
    ({"batch_ramp": ()}, "first stage starts at 0"),
    ({"batch_ramp": (BatchStage(from_tokens=5, global_batch_tokens=8),)}, "first stage starts at 0"),
    ({"batch_ramp": (BatchStage(from_tokens=0, global_batch_tokens=0),)}, "at least one sequence"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_meaningless_schedules_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**fields)


def test_a_plateau_needs_exactly_one_length() -> None:
    with pytest.raises(ValueError, match="exactly one of them must be positive"):
        Plateau(learning_rate=1e-4)
    with pytest.raises(ValueError, match="exactly one of them must be positive"):
        Plateau(learning_rate=1e-4, tokens=1, steps=1)
