"""Needles and losses by position are read off the right tokens, and no layout changes them."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from data_pipeline.needle_rows import NeedleRows
from data_pipeline.synthetic import CITIES, make_problem
from data_pipeline.tokenize import DocumentEncoder, train_byte_level_bpe
from megatron_m1.longcontext import evaluate
from megatron_m1.longcontext.config import MOST_NEEDLES
from megatron_m1.longcontext.pictures import needle_picture, position_picture, progress_picture
from megatron_m1.model.packed import Packed
from parallel.layout import Layout
from tests.longcontext import evaluate_ranks as ranks
from tests.rl.generate_ranks import build
from tests.spawn import run_ranks

LAYOUTS_OF_FOUR = [Layout(tp=2, cp=2), Layout(pp=2, vpp=2, dp=2, ep=2), Layout(cp=2, pp=2)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_byte_level_bpe((make_problem("needle", 1, i, 60).text for i in range(50)), 400, path)
    return DocumentEncoder(path)


@pytest.fixture(scope="module")
def measured(alone):
    bound = evaluate.FOUND_BELOW_NATS
    yield ranks.measure(alone)
    evaluate.FOUND_BELOW_NATS = bound


def test_found_and_losses_are_those_of_the_logits(alone, measured):
    grid, curve = measured
    (chunk,) = build(alone)

    def losses_of(row):
        lengths = [int(length) for length in row.document_lengths]
        packed = Packed.from_lengths(
            lengths, row_tokens=sum(lengths), auxiliary_weight=0.0, device=torch.device("cpu")
        )
        with torch.no_grad():
            log_probs_TP = chunk(torch.as_tensor(row.tokens_S), packed).log_softmax(-1)
        return -log_probs_TP.gather(1, torch.as_tensor(row.labels_S)[:, None])[:, 0].numpy()

    expected = np.zeros((2, 3))
    for i, length in enumerate(ranks.CONFIG.needle_lengths):
        for j, depth in enumerate(ranks.CONFIG.depths):
            for trial in range(5):
                row = ranks.make_row(length, depth, trial)
                expected[i, j] += (losses_of(row)[row.loss_mask_S > 0] < ranks.BOUND_NATS).all() / 5
    assert 0.1 < expected.mean() < 0.9, "the test would not see a wrong criterion"
    assert np.allclose(grid.found_LD, expected)
    assert curve.tokens.sum() == 3 * 128
    # the first part: the first 64 tokens of both documents of every row
    first = [
        losses_of(row)[at]
        for row in (ranks.make_row(128, 0.0, trial) for trial in range(3))
        for at in range(128)
        if (at if at < row.document_lengths[0] else at - row.document_lengths[0]) < 64
    ]
    assert curve.loss_nats[0] == pytest.approx(np.mean(first), rel=1e-5)


def test_layouts_measure_the_same(measured):
    grid, curve = measured
    for by_layout in run_ranks(4, ranks.in_layouts, LAYOUTS_OF_FOUR):
        for other_grid, other_curve in by_layout:
            assert np.allclose(other_grid.found_LD, grid.found_LD)
            assert np.allclose(other_curve.loss_nats, curve.loss_nats, rtol=1e-5, equal_nan=True)


def test_pictures_are_written(measured, tmp_path):
    grid, curve = measured
    needle_picture(grid, "test", tmp_path / "new" / "needles.png")
    position_picture({"test": curve}, tmp_path / "new" / "positions.png")
    progress_picture([("short", 64, grid), ("long", 128, grid)], "test", tmp_path / "new" / "progress.png")
    for name in ("needles", "positions", "progress"):
        assert (tmp_path / "new" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_needle_rows_hold_the_needle_where_it_was_asked_for(tokenizer):
    rows = NeedleRows(tokenizer, seed=3)
    for depth in (0.0, 0.5, 1.0):
        row = rows.make(600, depth, 2)
        text = tokenizer.decode(row.tokens_S[: row.document_lengths[0]])
        place = text.index("The secret number is") / text.index("\nWhat is the secret number?")
        assert abs(place - depth) < 0.1
        answer = tokenizer.decode(row.labels_S[row.loss_mask_S > 0]).strip()
        assert f"The secret number is {answer}." in text and answer.isdigit()
        assert len(row.tokens_S) == 600 == row.document_lengths.sum()
    assert (rows.make(600, 0.5, 2).tokens_S == rows.make(600, 0.5, 2).tokens_S).all()
    assert (rows.make(600, 0.5, 2).tokens_S != rows.make(600, 0.5, 3).tokens_S).any()


def test_rows_of_several_needles_ask_for_all_and_count_the_one_at_the_depth(tokenizer):
    rows = NeedleRows(tokenizer, seed=3, num_spread=3)
    whole = [rows.make_spread(700, depth, 1) for depth in (0.0, 0.5, 1.0)]
    assert all((row.tokens_S == whole[0].tokens_S).all() for row in whole), "one text for all depths"
    text = tokenizer.decode(whole[0].tokens_S[: whole[0].document_lengths[0]])
    question = re.search(r"What are the codes of (.*), in this order\?\nAnswer:(.*)", text)
    answers = dict(zip(question[1].split(", "), question[2].split(), strict=True))
    facts = [
        (match.start() / question.start(), match[1], match[2])
        for match in re.finditer(r"The code of (\w+) is (\d+)\.", text)
    ]
    for row, depth, (place, city, number) in zip(whole, (0.0, 0.5, 1.0), facts, strict=True):
        assert abs(place - depth) < 0.1
        counted = tokenizer.decode(row.labels_S[row.loss_mask_S > 0]).strip()
        assert counted == number == answers[city]
    assert sum((row.loss_mask_S > 0).astype(int) for row in whole).max() == 1, (
        "no token counts for two needles"
    )


def test_more_needles_than_cities_are_refused_with_the_nearest_number():
    assert len(CITIES) == MOST_NEEDLES
    evaluate.LongContextConfig(multi_needles=MOST_NEEDLES)
    for count, nearest in ((1, 2), (11, 10)):
        with pytest.raises(ValueError, match=f"multi_needles={count}: .*choose {nearest}"):
            evaluate.LongContextConfig(multi_needles=count)


def test_a_row_too_short_for_a_needle_is_refused(tokenizer):
    with pytest.raises(ValueError, match="a needle with its question has .* tokens and the row 8"):
        NeedleRows(tokenizer, seed=3).make(8, 0.5, 0)
