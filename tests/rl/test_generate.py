"""Generation: recurrent and whole-sequence forms agree, and samples do not depend on order, slots, cuts or layout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_m1.model.packed import Packed
from megatron_m1.rl.draw import draw, sample_keys, uniforms
from parallel.layout import Layout
from tests.rl import generate_ranks as ranks
from tests.spawn import run_ranks
from tests.tolerances import GENERATED_LOG_PROB

LAYOUTS_OF_FOUR = [
    Layout(tp=2, pp=2),
    Layout(tp=2, pp=2, sequence_parallel=False),
    Layout(pp=2, vpp=2, dp=2, ep=2),
    Layout(dp=4, ep=4),
    Layout(tp=2, cp=2),
    Layout(pp=2, cp=2),
]


@pytest.fixture(scope="module")
def model(alone):
    return ranks.build(alone), alone


@pytest.fixture(scope="module")
def samples(model):
    return ranks.generate(*model, ranks.requests())


def test_log_probabilities_are_those_of_one_pass_over_the_whole_sequence(model, samples):
    chunks, _ = model
    by_id = {prompt.prompt_id: prompt for prompt in ranks.prompts()}
    for sample in samples:
        prompt = by_id[sample.prompt_id].tokens_S
        tokens = torch.from_numpy(np.concatenate([prompt, sample.tokens_S]))
        packed = Packed.from_lengths(
            [len(tokens)], row_tokens=len(tokens), auxiliary_weight=0.0, device=torch.device("cpu")
        )
        with torch.no_grad():
            log_probs_TP = chunks[0](tokens, packed).log_softmax(-1)
        expected = log_probs_TP[len(prompt) - 1 : -1].gather(1, tokens[len(prompt) :, None])[:, 0]
        worst = np.abs(expected.numpy() - sample.log_probs_S).max()
        assert worst < GENERATED_LOG_PROB, (sample.prompt_id, sample.sample_id, worst)


def test_samples_end_for_every_reason_and_differ(samples):
    # the window of 64 and the end token are both met by this model, and no two samples of a prompt are alike
    assert {sample.finish for sample in samples} == {"stop", "length"}
    assert len({tuple(sample.tokens_S) for sample in samples}) > len(samples) // 2
    for sample in samples:
        assert sample.finish != "stop" or sample.tokens_S[-1] == ranks.END
        assert ranks.END not in sample.tokens_S[:-1]
        assert (sample.versions_S == 7).all()


@pytest.mark.parametrize(
    "options",
    [{"slots": 15, "prefill_tokens": 1000}, {"slots": 1}, {"prefill_tokens": 1}],
    ids=["all at once", "one by one", "prompts read token by token"],
)
def test_slots_and_reading_do_not_change_samples(model, samples, options):
    _assert_same(ranks.answers(ranks.generate(*model, ranks.requests(), **options)), ranks.answers(samples))


def test_order_of_requests_does_not_change_samples(model, samples):
    shuffled = ranks.requests()
    np.random.default_rng(0).shuffle(shuffled)
    found = {answer.key: answer for answer in ranks.answers(ranks.generate(*model, shuffled))}
    _assert_same([found[answer.key] for answer in ranks.answers(samples)], ranks.answers(samples))


def test_a_cut_sample_carries_on_as_if_it_had_not_been_cut(model, samples):
    asked = ranks.requests()
    cut = ranks.generate(*model, asked, slots=15, max_passes=9)
    assert {sample.finish for sample in cut} > {None}
    earlier = {(sample.prompt_id, sample.sample_id): sample for sample in cut}
    unfinished = [
        ranks.Request(
            prompt=r.prompt, sample_id=r.sample_id, earlier=earlier.get((r.prompt.prompt_id, r.sample_id))
        )
        for r in asked
        if getattr(earlier.get((r.prompt.prompt_id, r.sample_id)), "finish", None) is None
    ]
    rest = ranks.generate(*model, unfinished)
    whole = {answer.key: answer for answer in ranks.answers([s for s in cut if s.finish is not None] + rest)}
    _assert_same([whole[answer.key] for answer in ranks.answers(samples)], ranks.answers(samples))


def test_layouts_do_not_change_samples(samples):
    by_rank = run_ranks(4, ranks.in_layouts, LAYOUTS_OF_FOUR)
    for found in by_rank:
        for in_layout in found:
            _assert_same(in_layout, ranks.answers(samples))


def test_a_capacity_of_training_drops_nothing_in_generation(alone, samples):
    tight = replace(ranks.MODEL, capacity_factor=0.5)
    _assert_same(
        ranks.answers(ranks.generate(ranks.build(alone, model=tight), alone, ranks.requests())),
        ranks.answers(samples),
    )


def test_a_sample_ends_at_its_own_limit_and_is_drawn_from_its_own_key(model, samples):
    first = ranks.requests()[0]
    key = int(sample_keys(3, np.array([first.prompt.prompt_id]), np.array([first.sample_id]))[0])
    stranger = ranks.Request(prompt=replace(first.prompt, prompt_id=99), sample_id=5, key=key, max_tokens=2)
    (found,) = ranks.generate(*model, [stranger])
    assert (found.tokens_S == samples[0].tokens_S[:2]).all() and found.finish == "length"


def test_repetition_stop_ends_a_sample(model):
    from megatron_m1.rl.stop import RepetitionConfig

    repetition = RepetitionConfig(tokens=1, full_window_tokens=1, least_tokens=1, probability=1e-9)
    found = ranks.generate(*model, ranks.requests(), repetition=repetition)
    assert {sample.finish for sample in found} <= {"repetition", "stop"}
    assert all(len(sample.tokens_S) == 1 for sample in found)


def test_prompt_that_fills_the_window_is_refused(model):
    with pytest.raises(
        ValueError, match=r"prompt 12 has 40 tokens.*window of 40 tokens leaves no room.*to 41 or more"
    ):
        ranks.generate(*model, ranks.requests(), window=40)


def test_draw_follows_the_distribution_and_top_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    u = torch.linspace(0, 1, 2001, dtype=torch.float64)[:-1]
    many = logits.expand(len(u), 4)
    tokens, log_probs = draw(many, u, temperature=1.0, top_p=1.0)
    shares = torch.bincount(tokens, minlength=4) / len(u)
    assert torch.allclose(shares, logits.exp(), atol=1e-3)
    assert torch.allclose(log_probs, logits[tokens])
    tokens, log_probs = draw(many, u, temperature=1.0, top_p=0.7)
    assert set(tokens.tolist()) == {0, 1}
    # the trainer knows nothing of top-p
    assert torch.allclose(log_probs, logits[tokens])
    assert set(draw(many, u, temperature=0.0, top_p=1.0)[0].tolist()) == {0}


def test_random_numbers_are_even_and_unlike():
    n = 20_000
    ids = np.arange(n)

    def of_seed(seed):
        return uniforms(sample_keys(seed, ids // 100, ids % 100), np.zeros(n, dtype=int))

    u = of_seed(1)
    assert abs(u.mean() - 0.5) < 0.01 and abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.02
    assert len(np.unique(np.concatenate([u, of_seed(2)]))) == 2 * n
    # a sample's numbers at different places are unlike, too
    by_place = uniforms(np.repeat(sample_keys(1, ids[:1], ids[:1]), n), ids)
    assert len(np.unique(by_place)) == n and abs(by_place.mean() - 0.5) < 0.01


def _assert_same(found, expected):
    assert [answer.key for answer in found] == [answer.key for answer in expected]
    for a, b in zip(found, expected, strict=True):
        assert (a.tokens, a.finish) == (b.tokens, b.finish), a.key
        assert np.allclose(a.log_probs, b.log_probs, atol=GENERATED_LOG_PROB, rtol=0), a.key
