"""Blends: weights hold at any prefix, and every source is read in full, in a row, once."""

import numpy as np
import pytest

from data_pipeline.index import ShardWriter, TokenShard
from data_pipeline.mix import WINDOW_SAMPLES, BlendedDataset, BlendSchedule
from data_pipeline.pack import PackedShard

WEIGHTS = [
    [1.0],
    [0.5, 0.5],
    [0.1, 0.2, 0.7],
    [3, 1, 1, 1, 1, 2],
    [0.9, 0.05, 0.03, 0.015, 0.005],
    [1 / 3, 1 / 7, 0.123456789, 1e-3],
    [1.0] * 40,
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_weights_hold_to_a_thousandth_over_ten_thousand_samples(weights):
    schedule = BlendSchedule(weights, key=3)
    shares = np.array(weights) / np.sum(weights)
    for start in (0, 12_345_678):
        sources = [schedule.locate(sample)[0] for sample in range(start, start + 10_000)]
        counts = np.bincount(sources, minlength=len(weights))
        assert np.abs(counts / 10_000 - shares).max() <= 1e-3, counts


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_each_source_is_asked_for_its_samples_in_full(weights):
    """At a window's end, the samples asked of a source are 0..n-1, each once."""
    schedule = BlendSchedule(weights, key=9)
    num_samples = 40 * WINDOW_SAMPLES
    asked = [[] for _ in weights]
    for sample in range(num_samples):
        source, number = schedule.locate(sample)
        asked[source].append(number)
    assert sum(map(len, asked)) == num_samples
    for numbers in asked:
        assert sorted(numbers) == list(range(len(numbers)))


def test_counts_are_within_half_a_sample_per_level_forever():
    weights = [0.1, 0.2, 0.3, 0.4]
    schedule = BlendSchedule(weights, key=1)
    window = 10**12
    numbers = [[], [], [], []]
    for sample in range(window * WINDOW_SAMPLES, (window + 1) * WINDOW_SAMPLES):
        source, number = schedule.locate(sample)
        numbers[source].append(number)
    for source, weight in enumerate(weights):
        assert abs(min(numbers[source]) - window * WINDOW_SAMPLES * weight) <= 1.0


def test_equal_weights_do_not_tie_a_source_to_a_rank():
    schedule = BlendSchedule([0.5, 0.5], key=2)
    sources = np.array([schedule.locate(sample)[0] for sample in range(8_000)])
    for num_ranks in (2, 4, 8):
        per_rank = sources.reshape(-1, num_ranks).mean(axis=0)
        assert np.abs(per_rank - 0.5).max() < 0.06, per_rank


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [1.0, -1.0], [float("nan")], [float("inf"), 1.0]])
def test_weights_that_are_not_shares_are_refused(weights):
    with pytest.raises(ValueError, match="cannot be blended: each source has a finite weight above 0"):
        BlendSchedule(weights, key=1)


def test_a_blend_returns_the_samples_of_its_sources(tmp_path):
    packed = []
    for source in range(3):
        prefix = tmp_path / f"source{source}"
        with ShardWriter(prefix, 100_000) as writer:
            for document in range(20):
                writer.add_document(np.full(7, 1000 * source + document))
        packed.append(PackedShard(TokenShard(prefix), 7, key=source))
    schedule = BlendSchedule([1, 2, 3], key=4)
    dataset = BlendedDataset(packed, schedule)
    assert dataset.num_rows_per_epoch == 60
    counts = np.zeros(3)
    for number in range(60):
        sample = dataset[number]
        source, in_source = schedule.locate(number)
        assert sample.sample_id == number
        np.testing.assert_array_equal(sample.tokens_S, packed[source][in_source].tokens_S)
        assert (sample.tokens_S // 1000 == source).all()
        counts[source] += 1
    assert counts == pytest.approx([10, 20, 30], abs=4)
    with pytest.raises(IndexError, match="numbered from 0"):
        dataset[-1]
