"""Keyed permutations: one-to-one, the same everywhere, and without a visible pattern."""

from collections import Counter

import numpy as np
import pytest

from data_pipeline.permute import KeyedPermutation, derive_key


@pytest.mark.parametrize("num_items", [1, 2, 3, 4, 5, 7, 8, 9, 64, 100, 1023, 1024, 1025, 5000])
def test_every_item_has_its_own_place(num_items):
    for key in range(5):
        permutation = KeyedPermutation(num_items, derive_key(key))
        places = permutation.all()
        assert sorted(places.tolist()) == list(range(num_items))
        assert [permutation(item) for item in range(min(num_items, 200))] == places[:200].tolist()


def test_the_order_never_changes_between_versions():
    """Runs are resumed by these numbers: a new result here breaks every checkpoint."""
    assert derive_key(1234, "train", "source", 0) == 2126553867088647447
    assert KeyedPermutation(10, 1).all().tolist() == [3, 5, 4, 6, 2, 0, 9, 7, 8, 1]
    assert KeyedPermutation(3_662_109_375, derive_key(7))(123_456_789) == 1_137_462_922


def test_one_place_of_billions_costs_no_table():
    permutation = KeyedPermutation(2**61, 5)
    places = {permutation(item) for item in range(1000)}
    assert len(places) == 1000
    assert max(places) > 2**60


def test_all_orders_of_four_items_are_about_equally_frequent():
    num_keys = 12_000
    counts = Counter(tuple(KeyedPermutation(4, derive_key(key)).all().tolist()) for key in range(num_keys))
    assert len(counts) == 24
    expected = num_keys / 24
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    # 23 degrees of freedom: above 60 with probability 4e-5.
    assert chi_square < 60, counts


def test_neighbours_are_not_kept_together():
    places = KeyedPermutation(100_000, derive_key(3)).all()
    assert abs(np.corrcoef(np.arange(100_000), places)[0, 1]) < 0.01
    distances = np.abs(np.diff(places))
    # Two random places among n are n / 3 apart on average.
    assert distances.mean() == pytest.approx(100_000 / 3, rel=0.02)
    assert np.count_nonzero(distances == 1) < 12


def test_keys_of_different_uses_are_unrelated():
    keys = {derive_key(seed, use, number) for seed in range(10) for use in "ab" for number in range(50)}
    assert len(keys) == 1000
    one, other = (
        KeyedPermutation(1000, derive_key(0, 1)).all(),
        KeyedPermutation(1000, derive_key(0, 2)).all(),
    )
    assert np.count_nonzero(one == other) < 12
