"""Work items: every token of every head exactly once, segments in order, a plan that no neighbour changes."""

from __future__ import annotations

import pytest
import torch

from kernels_cuda.lightning.plan import cut_document, deal_out, plan_scan, plan_states, segment_tokens_for


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("num_heads", [1, 8, 64])
def test_items_cover_every_token_of_every_column_once(num_heads, reverse):
    borders = (0, 1, 1, 700, 5000)
    plan = plan_scan(borders, num_heads, 128, reverse, 132)
    seen = torch.zeros(num_heads, 2, 5000, dtype=torch.int64)
    for first, tokens, head, block, *_ in plan.items.tolist():
        seen[head, block, first : first + tokens] += 1
    assert seen.eq(1).all()
    assert plan.items[:, 7].sum() == num_heads * 2 * 4, (
        "every document is closed once per column, the empty one too"
    )


def test_segments_but_the_last_are_whole_and_run_with_time():
    assert cut_document(10, 300, 128, False) == [(10, 128), (138, 128), (266, 34)]
    assert cut_document(10, 300, 128, True) == [(172, 128), (44, 128), (10, 34)]
    assert cut_document(10, 138, 128, True) == [(10, 128)]


def test_enough_heads_are_never_cut_and_few_heads_fill_the_gpu():
    assert segment_tokens_for(1 << 20, 128, 132) == 1 << 20
    assert segment_tokens_for(32768, 16, 132) == 4096
    plan = plan_scan((0, 32768), 8, 128, False, 132)
    assert len(plan.items) == 128
    assert len(plan.state_items) == 112
    assert plan.num_slots == 7


def test_a_document_is_cut_alike_whatever_its_neighbours():
    plans = [
        plan_scan(borders, 8, 128, False, 132) for borders in ((0, 100, 8100, 9000), (0, 40, 100, 8100, 9000))
    ]
    cuts = [{tuple(row[:2]) for row in plan.items.tolist() if 100 <= row[0] < 8100} for plan in plans]
    assert cuts[0] == cuts[1]


def test_dealing_keeps_all_items_and_turns_every_second_round():
    rows = torch.arange(7, dtype=torch.int32)[:, None].expand(7, 8)
    assert deal_out(rows, 3)[:, 0].tolist() == [0, 1, 2, 5, 4, 3, 6]


@pytest.mark.parametrize("reverse", [False, True])
def test_states_of_spans_cover_them_once_and_know_what_comes_after(reverse):
    spans = ((3, 50), (100, 5000))
    plan = plan_states(spans, 8, 128, reverse, 132)
    seen = torch.zeros(8, 2, 5000, dtype=torch.int64)
    for first, tokens, head, block, span, earlier, slot, closes in plan.items.tolist():
        seen[head, block, first : first + tokens] += 1
        after = first - spans[span][0] if reverse else spans[span][1] - first - tokens
        assert (plan.owned_MS[span, slot], plan.after_MS[span, slot]) == (1, after)
        assert (earlier, closes) == (0, 0)
    inside = torch.zeros(5000, dtype=torch.int64)
    inside[3:50] = inside[100:5000] = 1
    assert seen.eq(inside).all()
    assert plan.owned_MS.sum() == plan.num_slots == 9
