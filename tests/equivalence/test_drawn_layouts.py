"""Layouts with context parallelism, drawn with their splits, exchanges and ragged packs, equal one process.

The hand-picked ones are in matrix.py. `-m slow`: the first dozen in `make test` would cost two minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume
from hypothesis import strategies as st

from parallel.layout import Layout, divisors
from tests.equivalence.matrix import RECOMPUTE, Case
from tests.equivalence.runner import GLOBAL_ROWS, MODEL, SEQUENCE
from tests.equivalence.test_equivalence import assert_equal, run_all
from tests.parallel.split_cases import drawn

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


@st.composite
def cases(draw: Callable, world: int, cp: int) -> Case:
    pp = draw(st.sampled_from(divisors(world // cp)[::-1]))
    tp = draw(st.sampled_from([n for n in divisors(world // cp // pp) if MODEL.num_kv_heads % n == 0][::-1]))
    dp = world // cp // tp // pp
    ep = draw(st.sampled_from([n for n in divisors(tp * cp * dp) if MODEL.num_experts % n == 0]))
    exchange = draw(
        st.sampled_from(["all_gather", "ring", "hierarchical"] if cp > 2 else ["all_gather", "ring"])
    )
    layout = Layout(
        tp=tp,
        pp=pp,
        cp=cp,
        dp=dp,
        ep=ep,
        sequence_parallel=draw(st.booleans()),
        cp_split=draw(st.sampled_from(["zigzag", "contiguous"])),
        cp_exchange=exchange,
        cp_inner=2 if exchange == "hierarchical" else 1,
        cp_attention=draw(st.sampled_from(["ring", "all_gather"])),
    )
    micro_batch = draw(st.sampled_from([n for n in divisors(GLOBAL_ROWS // dp) if n < 8]))
    assume(micro_batch * SEQUENCE % layout.token_shares == 0)
    options = draw(st.sampled_from([{}, RECOMPUTE]))
    return Case(layout, micro_batch, options, packs=draw(st.integers(1, 3)))


# ranks, cp, and how many are drawn
_COUNTS = ((2, 2, 3), (4, 2, 4), (4, 4, 3), (8, 2, 3), (8, 4, 3), (8, 8, 2))
DRAWN = list(
    {case.name: case for world, cp, count in _COUNTS for case in drawn(cases(world, cp), count)}.values()
)


@pytest.fixture(scope="module")
def results() -> dict[str, list[dict[str, Any]]]:
    return run_all(DRAWN)


def test_the_draw_mixes_every_axis_with_context_parallelism() -> None:
    assert {case.layout.cp for case in DRAWN} == {2, 4, 8}
    for axis in ("tp", "pp", "ep"):
        assert any(getattr(case.layout, axis) > 1 for case in DRAWN), axis


@pytest.mark.parametrize("case", DRAWN, ids=lambda case: case.name)
def test_a_drawn_layout_equals_one_process(case: Case, results: dict[str, list[dict[str, Any]]]) -> None:
    assert_equal(case, results)
