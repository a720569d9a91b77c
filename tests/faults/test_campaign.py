"""Faults in four-process runs lose nothing, change nothing, and are named: twenty runs here.

`python -m tests.faults` prints the table, and makes as many as a night has room for.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults.__main__ import Campaign
from tests.faults.kinds import KINDS, can_run

pytestmark = pytest.mark.multiprocess
RUNS = 20


def test_each_fault_is_noticed_and_the_run_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    kinds, record = [kind for kind in KINDS if can_run(kind)], tmp_path / "record.jsonl"
    work = tmp_path / "work"
    work.mkdir()
    campaign = Campaign(runs=RUNS, seed=1, kinds=kinds, directory=work, record=record)
    rows, num_left = campaign.run()
    assert (sum(len(row.outcomes) for row in rows), num_left) == (RUNS, 0)
    assert [row for row in rows if not row.good] == []
    # what is on record is not made again
    shutil.rmtree(work)
    assert campaign.run() == (rows, 0)
    with pytest.raises(ValueError, match="it must be the record of seed 2"):
        Campaign(runs=RUNS, seed=2, kinds=kinds, directory=work, record=record).run()
