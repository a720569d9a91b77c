"""Cut tensors: ranges cover each tensor once, owners are balanced, and the exchange is exact both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from parallel import ownership
from parallel.ownership import CutTensor, Exchange, assign_owners, ranges_of
from tests.spawn import run_ranks


def test_ranges_of_a_tensor_across_two_borders() -> None:
    # bucket of 12 over 3 ranks is cut at 4 and 8; the tensor takes [3, 9)
    assert ranges_of(3, 9, 12, 3) == ((0, 1), (1, 5), (5, 6))
    assert ranges_of(0, 4, 12, 3) == ((0, 4), (4, 4), (4, 4))
    assert ranges_of(9, 12, 12, 3) == ((0, 0), (0, 0), (0, 3))


@given(st.integers(1, 9), st.integers(1, 40), st.data())
def test_ranges_cover_every_element_once(num_ranks: int, share: int, data: st.DataObject) -> None:
    total = num_ranks * share
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, total))
    ranges = ranges_of(start, stop, total, num_ranks)
    elements = [element for first, last in ranges for element in range(first, last)]
    assert elements == list(range(stop - start))
    for rank, (first, last) in enumerate(ranges):
        assert all(rank * share <= start + element < (rank + 1) * share for element in range(first, last))


def test_owners_of_hand_made_weights() -> None:
    assert assign_owners([1, 7, 3, 3], 2) == [1, 0, 1, 1]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 8))
def test_no_owner_has_more_than_its_share_and_one_tensor(weights: list[int], num_ranks: int) -> None:
    owners = assign_owners(weights, num_ranks)
    loads = [
        sum(weight for weight, owner in zip(weights, owners, strict=True) if owner == rank)
        for rank in range(num_ranks)
    ]
    assert sum(loads) == sum(weights)
    assert max(loads) <= sum(weights) / num_ranks + max(weights)


def exchange_there_and_back(batch_elements: int) -> dict[str, Any]:
    """Three tensors of a bucket of 24, cut over three ranks; rank r owns tensor 2 - r."""
    ownership._BATCH_ELEMENTS = batch_elements
    rank = dist.get_rank()
    places = [(0, 10), (10, 11), (11, 23)]
    cuts = [CutTensor(ranges_of(start, stop, 24, 3), 2 - index) for index, (start, stop) in enumerate(places)]
    whole = [torch.arange(start, stop, dtype=torch.float32) for start, stop in places]
    own = [tensor[slice(*cut.ranges[rank])].clone() for tensor, cut in zip(whole, cuts, strict=True)]
    exchange = Exchange(cuts, dist.group.WORLD)
    gathered = exchange.to_owners(own)
    back = [torch.full_like(piece, -1.0) for piece in own]
    exchange.to_pieces({index: tensor.view(1, -1) for index, tensor in gathered.items()}, back)
    return {
        "owned": exchange.owned,
        "exact": all(torch.equal(tensor, whole[index]) for index, tensor in gathered.items()),
        "gathered": sorted(gathered),
        "back": all(torch.equal(a, b) for a, b in zip(own, back, strict=True)),
    }


@pytest.mark.multiprocess
def test_exchange_brings_whole_tensors_to_owners_and_pieces_back() -> None:
    for rank, found in enumerate(run_ranks(3, exchange_there_and_back, 11)):
        assert found == {"owned": [2 - rank], "exact": True, "gathered": [2 - rank], "back": True}
