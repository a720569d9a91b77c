"""Faults in four-process runs lose nothing, change nothing, and are named: twenty runs. `python -m tests.faults` prints
the table, and makes as many as a night has room for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.__main__ import campaign, is_good
from tests.faults.kinds import KINDS, can_run

pytestmark = pytest.mark.multiprocess
RUNS = 20


def test_each_fault_is_noticed_and_the_run_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    rows = campaign(RUNS, 1, tmp_path, [name for name in KINDS if can_run(name)])
    assert sum(row.runs for row in rows.values()) == RUNS
    for name, row in rows.items():
        assert is_good(name, row), (name, row)
