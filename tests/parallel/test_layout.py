"""The rank grid: arithmetic by hand, agreement with megatron-core's order, and refusals that name what would work."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.parallel_state import RankGenerator

from parallel.layout import Layout, divisors

SIZES = st.sampled_from([1, 2, 3, 4])


def test_sizes_multiply_to_the_world() -> None:
    layout = Layout(tp=2, pp=3, cp=2, dp=4, ep=4, etp=2)
    assert layout.world_size == 48
    assert layout.edp == 2


def test_coordinates_of_a_rank_computed_by_hand() -> None:
    layout = Layout(tp=2, pp=2, dp=2, ep=4)
    # rank 6: second pipeline stage (4 ranks each), third rank in it: tp 0 of the second dp replica, third expert group
    assert layout.coordinates(6) == {"tp": 0, "cp": 0, "dp": 1, "pp": 1, "etp": 0, "ep": 2, "edp": 0}


@given(tp=SIZES, cp=SIZES, dp=SIZES, pp=SIZES, ep=SIZES, etp=SIZES)
def test_coordinates_agree_with_the_rank_order_of_megatron_core(
    tp: int, cp: int, dp: int, pp: int, ep: int, etp: int
) -> None:
    if tp * cp * dp % (ep * etp):
        return
    layout = Layout(tp=tp, cp=cp, dp=dp, pp=pp, ep=ep, etp=etp)
    dense = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order="tp-cp-ep-dp-pp")
    expert = RankGenerator(tp=etp, ep=ep, dp=layout.edp, pp=pp, cp=1, order="tp-cp-ep-dp-pp")
    names = {"tp": (dense, "tp"), "cp": (dense, "cp"), "dp": (dense, "dp"), "pp": (dense, "pp")}
    names |= {"etp": (expert, "tp"), "ep": (expert, "ep"), "edp": (expert, "dp")}
    for axis, (generator, token) in names.items():
        for ranks in generator.get_ranks(token):
            assert [layout.coordinates(rank)[axis] for rank in ranks] == list(range(len(ranks)))


def test_coordinates_name_every_rank_once() -> None:
    layout = Layout(tp=2, pp=2, cp=2, dp=3, ep=3, etp=2)
    for axes in (("tp", "cp", "dp", "pp"), ("etp", "ep", "edp", "pp")):
        seen = {tuple(layout.coordinates(rank)[axis] for axis in axes) for rank in range(layout.world_size)}
        assert len(seen) == layout.world_size


def test_dp_grows_to_fill_the_world() -> None:
    assert Layout(tp=2, pp=2).fit_to_world(16).dp == 4
    with pytest.raises(
        ValueError, match=r"world size 6 is not a multiple of tp\*cp\*pp=4: start a multiple of 4"
    ):
        Layout(tp=2, pp=2).fit_to_world(6)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 0}, r"layout.tp=0 is not a size: it must be 1 or more; set it to 1"),
        ({"vpp": 2}, r"layout.vpp=2 with layout.pp=1: .*; set layout.vpp=1 or raise layout.pp"),
        ({"tp": 4, "ep": 3}, r"layout.ep=3 x layout.etp=1 does not divide tp\*cp\*dp=4: .* \[1, 2, 4\]"),
        (
            {"cp": 8, "cp_exchange": "hierarchical", "cp_inner": 3},
            r"layout.cp_inner=3 with layout.cp=8: .* cp_inner can be one of \[2, 4\]",
        ),
        (
            {"cp": 2, "cp_exchange": "hierarchical"},
            r"with layout.cp=2: .* cp_inner can be no size for this cp",
        ),
        ({"cp": 8, "cp_exchange": "hierarchical"}, r"layout.cp_inner=1 with layout.cp=8: .* \[2, 4\]"),
        ({"cp_decay_floor": 1.0}, r"layout.cp_decay_floor=1.0 is not a decay: it must be 0 .* below 1"),
    ],
)
def test_impossible_sizes_are_refused_with_what_is_allowed(sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(**sizes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"pp": 3}, r"layout.pp=3 does not divide the model's 80 layers: choose pp from \[1, 2, 4, 5, 8"),
        ({"tp": 3, "dp": 1}, r"layout.tp=3 does not divide the model's 64 attention heads: choose tp from"),
        (
            {"tp": 16},
            r"layout.tp=16 does not divide the model's 8 key/value heads: choose tp from \[1, 2, 4, 8\]",
        ),
        ({"dp": 3, "ep": 3}, r"layout.ep=3 does not divide the model's 32 experts"),
    ],
)
def test_a_model_that_does_not_split_is_refused(sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(**sizes).check_model(num_layers=80, num_heads=64, num_kv_heads=8, num_experts=32)


def test_microbatches_are_counted_and_checked() -> None:
    layout = Layout(tp=2, pp=4, vpp=2, dp=2)
    assert layout.check_batch(global_batch=32, micro_batch=2, sequence_length=64) == 8
    with pytest.raises(
        ValueError, match=r"global batch of 30 samples is not a multiple of micro_batch_size\*dp=4"
    ):
        layout.check_batch(global_batch=30, micro_batch=2, sequence_length=64)
    with pytest.raises(ValueError, match="2 microbatches per step with layout.vpp=2: .* multiple of pp=4"):
        layout.check_batch(global_batch=8, micro_batch=2, sequence_length=64)
    with pytest.raises(
        ValueError, match=r"sequence_length=33 x micro_batch_size=1 does not split over cp\*tp=2.*32 and 34"
    ):
        layout.check_batch(global_batch=32, micro_batch=1, sequence_length=33)


def test_tokens_divide_over_the_chunks_of_the_context_split() -> None:
    assert Layout(tp=2, cp=4).token_shares == 16
    assert Layout(tp=2, cp=4, cp_split="contiguous").token_shares == 8
    assert Layout(tp=2).token_shares == 2
    with pytest.raises(
        ValueError,
        match=r"sequence_length=24 x micro_batch_size=1 does not split over 2\*cp\*tp=16.*16 and 32",
    ):
        Layout(tp=2, cp=4).check_batch(global_batch=2, micro_batch=1, sequence_length=24)


def test_divisors_are_all_and_ascending() -> None:
    assert divisors(80) == [1, 2, 4, 5, 8, 10, 16, 20, 40, 80]
