"""Prompts read by all cp ranks together leave on each of them what one process has, and decode goes on from it."""

from __future__ import annotations

import pytest
import torch

from megatron_m1.model.cache import SequenceCache
from megatron_m1.model.prefill import prefilling
from parallel.layout import Layout
from parallel.split import Piece
from tests.model.prefill_ranks import run_layouts
from tests.spawn import run_ranks
from tests.tolerances import GENERATED_LOG_PROB

LAYOUTS = [
    Layout(cp=4),
    Layout(cp=4, cp_split="contiguous", cp_exchange="ring", cp_attention="all_gather"),
    Layout(cp=4, cp_exchange="hierarchical", cp_inner=2),
    Layout(cp=2, dp=2, ep=4, cp_split="contiguous"),
    Layout(tp=2, cp=2, ep=2),
]


@pytest.mark.multiprocess
def test_prefill_over_ranks_equals_one_process():
    ((one,),) = run_ranks(1, run_layouts, [Layout()])
    for number, rank in enumerate(run_ranks(4, run_layouts, LAYOUTS)):
        for found in rank:
            # with tp a rank caches its own heads: of states and of keys alike
            tp = found["tp"]
            for layer, states in one["states"].items():
                own = states.chunk(tp, dim=1)[number % tp]
                torch.testing.assert_close(found["states"][layer], own, rtol=1e-5, atol=1e-6)
                assert own[[0, 2, 3]].abs().amax((1, 2, 3)).min() > 1e-4
            for name in ("keys", "values"):
                for layer, slots in one[name].items():
                    for own, whole in zip(found[name][layer], slots, strict=True):
                        torch.testing.assert_close(
                            own, whole.chunk(tp, dim=1)[number % tp], rtol=1e-5, atol=1e-6
                        )
            log_probs = [x["logits"].log_softmax(-1) for x in (found, one)]
            assert (log_probs[0] - log_probs[1]).abs().max() < GENERATED_LOG_PROB


def test_a_prompt_that_was_begun_is_refused():
    cache = SequenceCache(num_slots=2, window=64, device=torch.device("cpu"))
    cache.lengths[1] = 5
    with pytest.raises(ValueError, match=r"slots hold tokens already \(slot: tokens\) \{1: 5\}"):
        prefilling(cache, [1], [8], Piece(num_ranks=2))
