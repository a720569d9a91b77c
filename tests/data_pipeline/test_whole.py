"""Whole documents: none that fits is cut, none is lost or doubled over an epoch, also across stages."""

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import Selection
from data_pipeline.whole import WholeDocuments, WholeRule, best_fit, greedy
from tests.data_pipeline.numbered import firsts_of, numbered_shard, read_and_predicted


@pytest.mark.parametrize(
    ("pack", "rows"),
    [
        # 6 fills a row with 4 (or 3 and 1), 5 with 5: longest first, each into the fullest row with room
        (best_fit, [0, 1, 1, 0, 2, 2]),
        (greedy, [0, 1, 1, 2, 2, 2]),
    ],
)
def test_packing_by_hand(pack, rows):
    found = pack(np.array([6, 5, 5, 4, 3, 1]), 10)
    assert found.tolist() == rows


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=200), st.sampled_from([best_fit, greedy]))
def test_no_row_is_overfull_and_rows_are_few(positions, pack):
    rows = pack(np.array(positions), 64)
    filled = np.bincount(rows, weights=positions)
    assert filled.max() <= 64 and filled.min() > 0
    best = -(-sum(positions) // 64)
    # Best-fit decreasing needs at most 11/9 of the optimum and 4 rows; greedy at most twice as many.
    assert len(filled) <= (best * 2 + 1 if pack is greedy else max(1, best) * 1.7 + 1)
    # Greedy: a row's first document did not fit into the row before. Best fit: no two rows fit together.
    order = np.sort(filled)
    assert len(order) < 2 or pack is greedy or order[0] + order[1] > 64
    if pack is greedy:
        for row in range(1, len(filled)):
            assert filled[row - 1] + positions[int(np.argmax(rows == row))] > 64


RULES = st.builds(
    WholeRule,
    packing=st.sampled_from(["greedy", "best_fit"]),
    too_long=st.just("split"),
    max_epochs=st.just(2),
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=40),
    RULES,
    st.sampled_from([1, 4]),
    st.lists(st.tuples(st.sampled_from([8, 16, 32]), st.integers(0, 20)), max_size=4),
    st.integers(0, 2**64 - 1),
)
def test_each_token_is_read_once_per_epoch_across_stages(corpus_prefix, lengths, rule, multiple, stages, key):
    shard = numbered_shard(corpus_prefix, lengths)
    source = WholeDocuments("s", shard, key, rule, Selection(multiple=multiple))
    ends = np.cumsum(lengths)
    read, predicted = Counter(), Counter()
    for sequence_length, wanted in [*stages, (16, 10**9)]:
        count = min(wanted, source.rows_left(sequence_length))
        rows = source.take(sequence_length, count)
        rows = pickle.loads(pickle.dumps(rows))
        for total, part in zip((read, predicted), read_and_predicted(rows, count), strict=True):
            total.update(part)
        for number in range(count):
            assert not (rows[number].document_lengths[:-1] % multiple).any()
    assert source.rows_left(8) == 0
    everything = set(range(1, shard.num_tokens + 1))
    assert read == dict.fromkeys(everything, 2)
    assert predicted == dict.fromkeys(everything - set(firsts_of(lengths)), 2)
    # In a run without stages, documents of at most a row are in one piece.
    rows = WholeDocuments("s", shard, key, rule, Selection(multiple=multiple)).take(32, None)
    for number in range(rows.every.num_rows):
        row = rows[number]
        for run in np.split(row.tokens_S, np.cumsum(row.document_lengths)[:-1]):
            tokens = run[run > 0]
            if len(tokens):
                document = int(np.searchsorted(ends, tokens[0]))
                assert lengths[document] > 32 or len(tokens) == lengths[document]


def test_documents_longer_than_a_row_can_be_left_to_a_later_stage(tmp_path):
    lengths = [5, 40, 7, 8, 33, 6]
    shard = numbered_shard(tmp_path / "s", lengths)
    source = WholeDocuments("s", shard, 1, WholeRule(too_long="skip", max_epochs=1))
    count = source.rows_left(16)
    short, _ = read_and_predicted(source.take(16, count), count)
    assert (count, sum(short.values())) == (2, 26)
    count = source.rows_left(64)
    long, _ = read_and_predicted(source.take(64, count), count)
    assert (count, sum(long.values())) == (2, 73)
    assert not set(short) & set(long)
    assert source.rows_left(64) == 0


def test_a_document_longer_than_a_row_is_refused_with_the_row_it_needs(tmp_path):
    shard = numbered_shard(tmp_path / "s", [5, 700, 12, 900])
    rule = WholeRule(too_long="refuse")
    source = WholeDocuments("s", shard, 1, rule, Selection(multiple=256))
    with pytest.raises(
        ValueError, match="has 1 documents of more than 768 tokens.*has 900.*sequence_length=1024 or"
    ):
        source.take(768, 1)
    assert source.take(1024, 1)[0].document_lengths.sum() == 1024


def test_a_stage_in_which_every_document_is_too_long_is_refused(tmp_path):
    shard = numbered_shard(tmp_path / "s", [40, 41])
    source = WholeDocuments("s", shard, 1, WholeRule(too_long="skip"))
    with pytest.raises(ValueError, match="no document of at most 16 tokens .*; raise the sequence length"):
        source.take(16, None)
    assert source.take(16, 0)


def test_epochs_permute_rows_and_keys_change_who_shares_a_row(tmp_path):
    shard = numbered_shard(tmp_path / "s", np.random.default_rng(0).integers(1, 30, 300))
    rows = WholeDocuments("s", shard, 1, WholeRule()).take(64, None)
    num_rows = rows.every.num_rows
    epochs = [
        [rows[epoch * num_rows + row].tokens_S.tobytes() for row in range(num_rows)] for epoch in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert sum(one == other for one, other in zip(*epochs, strict=True)) < 6
    other = WholeDocuments("s", shard, 2, WholeRule()).take(64, None)
    assert {other[row].tokens_S.tobytes() for row in range(num_rows)} != set(epochs[0])


def test_more_documents_than_a_plan_takes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.whole.MAX_DOCUMENTS", 3)
    shard = numbered_shard(tmp_path / "s", [1, 2, 3, 4])
    with pytest.raises(ValueError, match="has 4 documents: .* takes at most 3; choose packing: split"):
        WholeDocuments("s", shard, 1, WholeRule())
