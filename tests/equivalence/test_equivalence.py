"""Every layout of the matrix equals one process: losses, each gradient tensor, routing, weights after two steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import tolerances
from tests.equivalence.matrix import LARGE, MATRIX, Case
from tests.equivalence.runner import assemble, assemble_routing, relative_rms, run_cases
from tests.spawn import run_ranks

pytestmark = pytest.mark.multiprocess


def reference_of(case: Case) -> Case:
    """One process with the same mathematics: only the switches that change the result are kept."""
    same = ("recompute", "overlap", "experts")
    kept = {name: value for name, value in case.options.items() if name not in same}
    return Case(type(case.layout)(), 1, kept, case.packs)


@pytest.fixture(scope="module")
def results() -> dict[str, list[dict[str, Any]]]:
    return run_all(MATRIX)


def run_all(wanted: list[Case]) -> dict[str, list[dict[str, Any]]]:
    """Case name -> what each rank brought back, references too; one launch per world size."""
    cases = {case.name: case for case in [*wanted, *(reference_of(case) for case in wanted)]}
    worlds = sorted({case.layout.world_size for case in cases.values()})
    found: dict[str, list[dict[str, Any]]] = {}
    for world in worlds:
        batch = [case for case in cases.values() if case.layout.world_size == world]
        ranks = run_ranks(world, run_cases, batch, timeout_s=900.0)
        for index, case in enumerate(batch):
            found[case.name] = [rank[index] for rank in ranks]
    return found


@pytest.mark.parametrize("case", MATRIX, ids=lambda case: case.name)
def test_layout_equals_one_process(case: Case, results: dict[str, list[dict[str, Any]]]) -> None:
    assert_equal(case, results)


@pytest.fixture(scope="module")
def large_results() -> dict[str, list[dict[str, Any]]]:
    return run_all(LARGE)


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_large_layout_equals_one_process(case: Case, large_results: dict[str, list[dict[str, Any]]]) -> None:
    assert_equal(case, large_results)


def assert_equal(case: Case, results: dict[str, list[dict[str, Any]]]) -> None:
    """Everything that the ranks brought back against one process."""
    ranks, [one] = results[case.name], results[reference_of(case).name]
    for rank in ranks:
        np.testing.assert_allclose(rank["losses"], one["losses"], rtol=tolerances.LOSS)
        np.testing.assert_allclose(rank["auxiliary"], one["auxiliary"], rtol=tolerances.LOSS)
        np.testing.assert_allclose(rank["norms"], one["norms"], rtol=tolerances.GRADIENT_RMS)
        assert rank["parts"] == one["parts"]
        np.testing.assert_allclose(
            rank["part_norms"], one["part_norms"], rtol=tolerances.GRADIENT_RMS, atol=1e-7
        )
        # the parts are all there is
        np.testing.assert_allclose(np.linalg.norm(rank["part_norms"], axis=1), rank["norms"], rtol=1e-5)
    for what, tolerance in (("gradients", tolerances.GRADIENT_RMS), ("weights", tolerances.WEIGHT_RMS)):
        expected = assemble([one[what]], tolerance=0.0)
        actual = assemble([rank[what] for rank in ranks], tolerance=tolerance)
        assert actual.keys() == expected.keys()
        errors = {key: relative_rms(actual[key], expected[key]) for key in expected}
        wrong = {key: error for key, error in errors.items() if error > tolerance}
        assert not wrong, f"{what} differ from one process: {wrong}"
    expected_routing = assemble_routing([one])
    actual_routing = assemble_routing(ranks)
    assert actual_routing.keys() == expected_routing.keys()
    for layer, decisions in expected_routing.items():
        assert np.array_equal(actual_routing[layer], decisions), f"routing differs in layer {layer}"
