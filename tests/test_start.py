"""What a start writes into the run directory, while other ranks of the same start read there."""

from __future__ import annotations

from pathlib import Path

from megatron_m1.config import RUN_FILE, dump_run, load_run
from megatron_m1.start import _prepare_directory


def test_a_rank_that_is_reading_the_run_file_reads_all_of_it(tmp_path: Path) -> None:
    given = tmp_path / RUN_FILE
    given.write_text("preset: tiny\n" + "# by hand\n" * 10**4)
    config = load_run(given, [f"run_dir={tmp_path}"])
    text = given.read_text()
    with given.open() as early:
        beginning = early.read(10)
        _prepare_directory(config, resume=True)
        assert beginning + early.read() == text
    assert given.read_text() == dump_run(config)
