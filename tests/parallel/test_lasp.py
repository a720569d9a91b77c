"""LASP+ equals the token-by-token recurrence over whole documents on any split: outputs, every gradient, states.

One start of eight ranks runs every case: ragged packs and splits drawn by hypothesis over cp 1, 2, 4 and 8 with every
exchange, chosen corners, and two planted faults that must be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from kernels_cuda.lightning.decay import lightning_slopes
from kernels_cuda.lightning.reference import recurrence
from parallel.lasp import horizon_of
from parallel.split import cut_over_ranks
from tests import tolerances
from tests.parallel.lasp_ranks import HEADS, KEY_DIM, VALUE_DIM, Case, operands, run_cases
from tests.parallel.split_cases import drawn, splits
from tests.spawn import run_ranks

pytestmark = pytest.mark.multiprocess

STATE_BYTES = HEADS * KEY_DIM * VALUE_DIM * 4
EXCHANGES = ("all_gather", "ring", "hierarchical")
# the steepest and the flattest heads of MiniMax-M1, and no decay at all
SLOPES = [(0.917, 0.0039), (0.0116, 4.95e-5), (0.5, 0.0)]


@st.composite
def cases(draw: Callable, ranks: int, exchange: str) -> Case:
    split = draw(splits(st.just(ranks)))
    inner = draw(st.sampled_from([n for n in (2, 4) if n < ranks])) if exchange == "hierarchical" else 1
    slopes, seed = draw(st.sampled_from(SLOPES)), draw(st.integers(0, 9))
    return Case(split.borders, split.segments, exchange, inner, slopes, seed=seed)


def usual(borders: tuple[int, ...], ranks: int, kind: Any, **changes: Any) -> Case:
    return Case(borders, cut_over_ranks(borders, ranks, kind).segments, **changes)


def lengths_of(*lengths: int) -> tuple[int, ...]:
    return (0, *torch.tensor(lengths).cumsum(0).tolist())


CORNERS = {
    "one document on all ranks": usual((0, 61), 8, "zigzag"),
    "edges on every rank border": usual(lengths_of(*[8] * 8), 8, "contiguous"),
    "edges off the rank borders": usual(lengths_of(7, 8, 8, 8, 8, 8, 8, 9), 8, "contiguous"),
    "documents of one token": usual(lengths_of(*[1] * 30), 4, "zigzag"),
    "most ranks are empty": usual((0, 3), 8, "zigzag"),
    "a document over several blocks and tiles": usual(lengths_of(5, 2600, 11), 2, "zigzag"),
}
PRECISIONS = {
    "float32": usual(lengths_of(3, 170, 1, 26), 4, "zigzag", dtype="float32"),
    "bfloat16": usual(lengths_of(3, 170, 1, 26), 4, "zigzag", dtype="bfloat16"),
}
# three documents, of which the middle one crosses both borders of rank 1
CROSSING = lengths_of(10, 30, 8)
FAULTS = {
    f"{fault}, {kind}, {exchange}": usual(
        CROSSING, 4, kind, exchange=exchange, inner=2 if exchange == "hierarchical" else 1, fault=fault
    )
    for fault in ("loses what entered", "leaks over a document edge")
    for kind in ("zigzag", "contiguous")
    for exchange in EXCHANGES
}
PAYLOADS = {
    (tokens, kind, exchange): usual(
        (0, tokens), 4, kind, exchange=exchange, inner=2 if exchange == "hierarchical" else 1, dtype="float32"
    )
    for tokens in (16, 1600)
    for kind in ("zigzag", "contiguous")
    for exchange in EXCHANGES
}
FLOOR = 1e-3
TRUNCATED = {
    exchange: usual(
        (0, 320),
        8,
        "contiguous",
        exchange=exchange,
        inner=2 if exchange == "hierarchical" else 1,
        slopes=(0.4, 0.3),
        decay_floor=FLOOR,
    )
    for exchange in EXCHANGES
}
LOCAL = usual(lengths_of(*[8] * 8), 4, "contiguous", dtype="float32")
DRAWN = [
    case
    for ranks, exchanges in ((1, EXCHANGES[:2]), (2, EXCHANGES[:2]), (4, EXCHANGES), (8, EXCHANGES))
    for exchange in exchanges
    for case in drawn(cases(ranks, exchange), 4 if ranks == 1 else 12)
]


@pytest.fixture(scope="module")
def results() -> dict[Case, list[dict[str, Any]]]:
    """Case -> what each of its ranks brought back."""
    everything = [
        *DRAWN,
        *(case for table in (CORNERS, PRECISIONS, FAULTS, PAYLOADS, TRUNCATED) for case in table.values()),
        LOCAL,
    ]
    ranks = run_ranks(8, run_cases, everything)
    return {
        case: [rank[index] for rank in ranks[: len(case.segments)]] for index, case in enumerate(everything)
    }


def expected(case: Case) -> dict[str, torch.Tensor]:
    """Outputs, gradients and states of the recurrence, one token after another, on one process in fp64."""
    q, k, v, grad_o = (x.double() for x in operands(case))
    for x in (q, k, v):
        x.requires_grad_()
    o, states = recurrence(q, k, v, torch.tensor(case.slopes), cu_seqlens=torch.tensor(case.borders))
    o.backward(grad_o)
    return {"o": o.detach(), "q": q.grad, "k": k.grad, "v": v.grad, "states": states.detach()}


def worst_error(case: Case, ranks: list[dict[str, Any]]) -> float:
    """Largest error relative to the largest value, over outputs, gradients and the documents' last states."""
    errors = []
    for name, reference in expected(case).items():
        parts = [rank[name] for rank in ranks]
        found = (sum(parts) if name == "states" else case.split.join(parts)).double()
        errors.append(float((found - reference).abs().max() / reference.abs().max().clamp(min=1e-30)))
    return max(errors)


@pytest.mark.parametrize("case", DRAWN, ids=range(len(DRAWN)))
def test_drawn_packs_and_splits_equal_the_recurrence(case, results):
    assert worst_error(case, results[case]) < 1e-12


@pytest.mark.parametrize("name", CORNERS)
def test_corners_equal_the_recurrence(name, results):
    assert worst_error(CORNERS[name], results[CORNERS[name]]) < 1e-12


def test_lower_precisions_stay_within_their_tolerance(results):
    assert worst_error(PRECISIONS["float32"], results[PRECISIONS["float32"]]) < tolerances.LOSS
    case = PRECISIONS["bfloat16"]
    for name, reference in expected(case).items():
        if name == "states":
            continue
        found = case.split.join([rank[name] for rank in results[case]]).double()
        square = (found - reference).square().mean((0, 2)) / reference.square().mean((0, 2))
        assert square.sqrt().max() < tolerances.BF16_OUTPUT_RMS, name


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(name, results):
    assert worst_error(FAULTS[name], results[FAULTS[name]]) > 1e-2


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
def test_bytes_sent_do_not_depend_on_the_length(kind, exchange, results):
    short, long = (results[PAYLOADS[tokens, kind, exchange]] for tokens in (16, 1600))
    sent = [rank["bytes"] for rank in long]
    assert sent == [rank["bytes"] for rank in short]
    borders = 2 if kind == "zigzag" else 1
    if exchange == "all_gather":
        assert sent == [(borders * STATE_BYTES,) * 2] * 4
    elif exchange == "ring":
        # rank 3 of zigzag hands its first chunk's state to its own second chunk
        hops = [1, 2, 2, 1] if kind == "zigzag" else [1, 1, 1, 0]
        assert [forward for forward, _ in sent] == [n * STATE_BYTES for n in hops]
        assert [backward for _, backward in sent] == [
            n * STATE_BYTES for n in (hops if kind == "zigzag" else hops[::-1])
        ]
    else:
        # within the node all borders; then one sum per node border in halves, and back
        assert max(forward for forward, _ in sent) <= (2 * borders + 1) * STATE_BYTES


def test_local_documents_send_nothing(results):
    assert [rank["bytes"] for rank in results[LOCAL]] == [(0, 0)] * 4
    assert worst_error(LOCAL, results[LOCAL]) < tolerances.LOSS


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_truncation_stays_within_its_stated_bound(exchange, results):
    """All four are sums of lambda^|i-j| (a_i b_j) c_j over the tokens before, or after, for other operands a, b, c."""
    case = TRUNCATED[exchange]
    q, k, v, grad_o = (x.double() for x in operands(case))
    sums = {
        "o": (q, k, v, False),
        "q": (grad_o, v, k, False),
        "k": (v, grad_o, q, True),
        "v": (k, q, grad_o, True),
    }
    exact = expected(case)
    decay_H = torch.exp(-torch.tensor(case.slopes, dtype=torch.float64))
    for name, (a, b, c, later) in sums.items():
        found = case.split.join([rank[name] for rank in results[case]])
        error_TH = (found - exact[name]).norm(dim=2)
        terms_HTT = torch.einsum("thk,jhk->htj", a, b).abs() * c.norm(dim=2).T[:, None]
        largest_HT = (terms_HTT.triu() if later else terms_HTT.tril()).amax(2)
        assert (error_TH <= (FLOOR / (1 - decay_H)) * largest_HT.T).all(), name
        assert error_TH.max() > 1e-9, f"nothing was left out of {name}"


def test_the_horizon_is_where_the_slowest_head_reaches_the_floor():
    slopes = lightning_slopes(64, 40, 80)
    horizon = horizon_of(slopes, 1e-6)
    assert torch.exp(-slopes.double().min() * horizon).item() == pytest.approx(1e-6)
    assert horizon_of(torch.tensor([0.5, 0.0]), 1e-6) == float("inf")
    # without a floor only what is zero in fp64 is left out
    assert torch.exp(-torch.tensor(0.5, dtype=torch.float64) * horizon_of(torch.tensor([0.5]), 0.0)) < 1e-320
