"""Training takes the experts that generation took, in any layout and under recompute, and routers go on learning."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_m1.model.packed import Packed
from megatron_m1.model.routing import RoutingRecord, replayed
from parallel.layout import Layout
from tests.rl import generate_ranks, replay_ranks
from tests.rl.test_generate import LAYOUTS_OF_FOUR
from tests.spawn import run_ranks
from tests.tolerances import GRADIENT_RMS, LOSS

LAYOUTS = [
    (Layout(tp=2, pp=2), "full"),
    (Layout(tp=2, pp=2, sequence_parallel=False), "lightning"),
    (Layout(pp=2, vpp=2, dp=2, ep=2), "none"),
    (Layout(tp=2, cp=2), "softmax"),
    (Layout(dp=4, ep=4), "none"),
]


@pytest.fixture(scope="module")
def samples(alone):
    chunks = generate_ranks.build(alone)
    return generate_ranks.generate(chunks, alone, generate_ranks.requests(), record_experts=True)


@pytest.fixture(scope="module")
def rows(samples):
    # eight answers, prompts of one token and of forty among them
    prompts = {prompt.prompt_id: prompt for prompt in generate_ranks.prompts()}
    return replay_ranks.make_rows(prompts, samples)[1:9]


def test_record_is_what_one_pass_over_the_whole_sequence_chooses(alone, samples):
    (chunk,) = generate_ranks.build(alone)
    prompts = {prompt.prompt_id: prompt for prompt in generate_ranks.prompts()}
    differ = total = 0
    for sample in samples:
        tokens = torch.from_numpy(np.concatenate([prompts[sample.prompt_id].tokens_S, sample.tokens_S])[:-1])
        packed = Packed.from_lengths(
            [len(tokens)], row_tokens=len(tokens), auxiliary_weight=0.0, device=torch.device("cpu")
        )
        packed = replace(packed, record=RoutingRecord())
        with torch.no_grad():
            chunk(tokens, packed)
        assert sample.experts_WLk is not None and sample.experts_WLk.dtype == np.int8
        assert sample.experts_WLk.shape == (len(tokens), 4, 2), sample.experts_WLk.shape
        whole = np.sort(packed.record.of_layers([0, 1, 2, 3]).numpy(), axis=-1)
        differ += int((np.sort(sample.experts_WLk, axis=-1) != whole).any(-1).sum())
        total += whole[..., 0].size
    # only where two experts are equal to rounding
    assert differ <= total * 1e-3, (differ, total)


def test_record_is_the_same_in_every_layout(samples):
    for by_layout in run_ranks(4, generate_ranks.experts_in_layouts, LAYOUTS_OF_FOUR[::2]):
        for found in by_layout:
            differ = [(a != b.experts_WLk).any(-1).mean() for a, b in zip(found, samples, strict=True)]
            assert max(differ) < 0.01, differ


def test_a_cut_sample_keeps_the_experts_of_its_log_probabilities(alone):
    chunks = generate_ranks.build(alone)
    asked = generate_ranks.requests(1)[2:3]
    (cut,) = generate_ranks.generate(chunks, alone, asked, record_experts=True, max_passes=7)
    assert cut.finish is None and cut.experts_WLk is not None
    with torch.no_grad():
        for _, router in chunks[0].routers():
            router.weight.neg_()
    on = [replace(asked[0], earlier=cut)]
    (rest,) = generate_ranks.generate(chunks, alone, on, record_experts=True)
    known = len(cut.experts_WLk)
    assert len(rest.experts_WLk) == 40 + len(rest.tokens_S) - 1 > known
    assert (rest.experts_WLk[:known] == cut.experts_WLk).all()


def test_training_takes_the_record_in_every_layout(alone, rows):
    one = replay_ranks.train(alone, rows)
    expected = sum(int((row.experts_SLk[..., 0] >= 0).sum()) for row in rows)
    assert (one.agree, one.differ) == (expected, 0)
    by_rank = run_ranks(4, replay_ranks.train_in_layouts, LAYOUTS, rows)
    for number, (layout, _) in enumerate(LAYOUTS):
        ranks = [found[number] for found in by_rank]
        assert [rank.differ for rank in ranks] == [0] * 4, layout
        assert sum(rank.agree for rank in ranks) == expected, layout
        for rank in ranks:
            assert abs(rank.loss - one.loss) < LOSS * one.loss, (layout, rank.loss, one.loss)
            for layer, gradient in rank.router_gradients.items():
                alike = one.router_gradients[layer]
                error = np.linalg.norm(gradient - alike) / np.linalg.norm(alike)
                assert error < GRADIENT_RMS, (layout, layer, error)


def test_without_the_record_these_routers_choose_others(alone, rows):
    free = [replace(row, experts_SLk=np.full_like(row.experts_SLk, -1)) for row in rows]
    assert replay_ranks.train(alone, free).loss != pytest.approx(
        replay_ranks.train(alone, rows).loss, abs=1e-3
    )


def test_a_record_that_is_one_layer_off_is_another_loss(alone, rows):
    shifted = [replace(row, experts_SLk=np.roll(row.experts_SLk, 1, axis=1)) for row in rows]
    assert replay_ranks.train(alone, shifted).loss != pytest.approx(
        replay_ranks.train(alone, rows).loss, abs=1e-3
    )


def test_weights_of_recorded_experts_are_computed_anew_and_have_gradients():
    logits_tE = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]], requires_grad=True)
    own_tk = torch.tensor([[0, 2], [1, 2]])
    recorded_tLk = torch.tensor([[[9, 9], [1, 2]], [[9, 9], [-1, -1]]], dtype=torch.int8)
    weights_tk, experts_tk = replayed(logits_tE, own_tk, recorded_tLk, 1)
    # the first token takes experts 1 and 2 against its own choice; the second has no record
    assert experts_tk.tolist() == [[1, 2], [1, 2]]
    p = 1 / (1 + np.exp(1.0))
    assert np.allclose(weights_tk.detach()[0], [p, 1 - p])
    weights_tk[0, 0].backward()
    # d softmax_0 / d logits = p (1 - p), -p (1 - p); nothing for an expert that was not taken
    expected = [[0.0, p * (1 - p), -p * (1 - p)], [0.0, 0.0, 0.0]]
    assert np.allclose(logits_tE.grad, expected)


def test_a_record_of_another_model_is_refused():
    logits_tE, own_tk = torch.zeros(2, 4), torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 2\), but layer 3 chooses 2 experts per token"):
        replayed(logits_tE, own_tk, torch.zeros(2, 3, 2, dtype=torch.int8), 3)
