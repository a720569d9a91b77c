"""The record keeps what was written, through crashes, full disks and resumes, and says what it lost."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from megatron_m1.training.metrics import StepMetrics, throughput
from megatron_m1.training.spool import RECORD_FILE_NAME, Spool, read_lines, read_steps


def step_metrics(step: int, loss_nats: float = 2.0, **fields: Any) -> StepMetrics:
    return StepMetrics(
        step=step, loss_nats=loss_nats, learning_rate=1e-3, consumed_samples=8 * step, consumed_tokens=800 *
        step, step_time_s=0.5, tokens_per_s=1600.0, **fields,
    )  # fmt: skip


def write_steps(spool: Spool, steps: range, loss_nats: float) -> None:
    for step in steps:
        spool.append("step", step, step_metrics(step, loss_nats).values())


def test_keys_carry_units_and_absent_quantities_are_absent() -> None:
    values = step_metrics(3, grad_norm=0.25, extra={"loss_nats/python": 1.5}).values()
    assert values == {
        "loss_nats": 2.0, "learning_rate": 1e-3, "consumed_samples": 24, "consumed_tokens": 2400,
        "step_time_s": 0.5, "tokens_per_s": 1600.0, "grad_norm": 0.25, "loss_nats/python": 1.5,
    }  # fmt: skip


def test_extra_may_not_overwrite_a_field() -> None:
    for name in ("loss_nats", "life", "step"):
        with pytest.raises(AssertionError, match=name):
            step_metrics(1, extra={name: 1.0})


def test_throughput_by_hand_and_no_mfu_without_a_peak() -> None:
    # 4000 tokens in 2 s at 6e9 operations each: 12 TFLOP/s, on 4 devices of 30 TFLOP/s a tenth.
    known = throughput(
        num_tokens=4000,
        step_time_s=2.0,
        flops_per_token=6e9,
        num_devices=4,
        peak_tflops_per_s_per_device=30.0,
    )
    assert known == pytest.approx({"tokens_per_s": 2000.0, "model_tflops_per_s": 12.0, "mfu": 0.1})
    unknown = throughput(
        num_tokens=4000,
        step_time_s=2.0,
        flops_per_token=6e9,
        num_devices=4,
        peak_tflops_per_s_per_device=None,
    )
    assert "mfu" not in unknown


def test_each_line_is_strict_json_and_non_finite_numbers_survive(tmp_path: Path) -> None:
    spool = Spool(tmp_path, None)
    spool.append("step", 1, {"loss_nats": math.nan, "grad_norm": math.inf, "low": -math.inf, "name": "a"})
    spool.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for raw in spool.path.read_text().splitlines():
        json.loads(raw, parse_constant=refuse)
    values = read_steps(spool.path)[1]
    assert math.isnan(values["loss_nats"])
    assert (values["grad_norm"], values["low"], values["name"]) == (math.inf, -math.inf, "a")


def test_a_resume_voids_later_steps_and_the_last_life_wins(tmp_path: Path) -> None:
    lives = ((None, range(1, 11), 1.0), (6, range(7, 9), 2.0), (4, range(5, 7), 3.0))
    for resume_from_step, steps, loss_nats in lives:
        spool = Spool(tmp_path, resume_from_step)
        write_steps(spool, steps, loss_nats)
        spool.close()
    assert spool.life == 2
    history = read_steps(spool.path)
    assert {step: values["loss_nats"] for step, values in history.items()} == {
        1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 3.0, 6: 3.0,
    }  # fmt: skip
    # 3 lives and 10 + 2 + 2 steps: nothing was cut from the file.
    assert len(list(read_lines(spool.path))) == 17


def test_a_fresh_start_voids_everything(tmp_path: Path) -> None:
    spool = Spool(tmp_path, None)
    write_steps(spool, range(1, 4), 1.0)
    spool.close()
    Spool(tmp_path, None).close()
    assert read_steps(spool.path) == {}


def test_evaluations_are_kept_apart_and_merged_per_step(tmp_path: Path) -> None:
    spool = Spool(tmp_path, None)
    write_steps(spool, range(1, 3), 1.0)
    spool.append("evaluation", 2, {"held_out_loss_nats": 4.0})
    spool.append("evaluation", 2, {"held_out_loss_nats/books": 5.0})
    spool.close()
    assert "held_out_loss_nats" not in read_steps(spool.path)[2]
    evaluation = read_steps(spool.path, "evaluation")
    assert list(evaluation) == [2]
    assert (evaluation[2]["held_out_loss_nats"], evaluation[2]["held_out_loss_nats/books"]) == (4.0, 5.0)


TORN_TAILS = [b'{"kind": "step", "life": 0, "st', bytes(4096), b"17\n", b'{"kind": "step"}\n']


@pytest.mark.parametrize("tail", TORN_TAILS, ids=["half a line", "zeros", "a number", "not ours"])
def test_a_torn_tail_costs_one_line_and_the_next_life_begins_on_its_own(tmp_path: Path, tail: bytes) -> None:
    spool = Spool(tmp_path, None)
    write_steps(spool, range(1, 4), 1.0)
    spool.close()
    with spool.path.open("ab") as file:
        file.write(tail)
    resumed = Spool(tmp_path, 3)
    write_steps(resumed, range(4, 6), 1.0)
    resumed.close()
    assert resumed.life == 1
    assert list(read_steps(resumed.path)) == [1, 2, 3, 4, 5]
    assert [line.values for line in read_lines(resumed.path)].count(None) == 1


def test_the_life_is_found_behind_a_tail_longer_than_one_block(tmp_path: Path) -> None:
    Spool(tmp_path, None).close()
    Spool(tmp_path, 0).close()
    with (tmp_path / RECORD_FILE_NAME).open("ab") as file:
        file.write(b"\x00" * 300_000)
    assert Spool(tmp_path, 0).life == 2


def test_an_unfinished_line_is_left_for_the_next_read(tmp_path: Path) -> None:
    spool = Spool(tmp_path, None)
    write_steps(spool, range(1, 3), 1.0)
    whole = spool.path.read_bytes()
    spool.path.write_bytes(whole[:-5])
    lines = list(read_lines(spool.path))
    assert len(lines) == 2
    spool.path.write_bytes(whole)
    (last,) = read_lines(spool.path, lines[-1].end_offset)
    assert last.values is not None
    assert (last.values["step"], last.end_offset) == (2, len(whole))


def test_a_full_disk_drops_lines_says_so_and_does_not_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(tmp_path, None)
    real_write = os.write
    room = [30]

    def write_until_full(descriptor: int, data: bytes) -> int:
        if room[0] == 0:
            raise OSError(28, "No space left on device")
        written = real_write(descriptor, bytes(data[: room[0]]))
        room[0] -= written
        return written

    monkeypatch.setattr("megatron_m1.training.spool.os.write", write_until_full)
    write_steps(spool, range(1, 4), 1.0)
    assert spool.num_dropped_lines == 3
    assert "No space left on device" in caplog.text
    monkeypatch.undo()
    write_steps(spool, range(4, 6), 1.0)
    spool.close()
    history = read_steps(spool.path)
    assert list(history) == [4, 5]
    assert history[5]["spool_dropped_lines"] == 3


def test_every_line_logged_before_a_sigkill_is_there(tmp_path: Path) -> None:
    program = textwrap.dedent(
        f"""
        import os, signal
        from pathlib import Path
        from megatron_m1.training.spool import Spool
        spool = Spool(Path({str(tmp_path)!r}), None)
        for step in range(1, 501):
            spool.append("step", step, {{"loss_nats": 1.0 / step}})
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", program], cwd=root, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    history = read_steps(tmp_path / RECORD_FILE_NAME)
    assert [history[step]["loss_nats"] for step in range(1, 501)] == [1.0 / step for step in range(1, 501)]
