"""Steps that may not change the weights are refused, written down and passed over; what a scrape shows is the truth."""

from __future__ import annotations

import math
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from megatron_m1.training.endpoint import MetricsEndpoint
from megatron_m1.training.health import BrokenRun, HealthConfig, Judge, Refused, refused_steps, write_refused

NAN = float("nan")


def judge(*, others: bool = False, written: list[Refused] | None = None, **settings) -> Judge:
    """A judge whose other ranks refuse nothing, or everything."""
    about = {name: settings.pop(name) for name in ("losses", "passed_over") if name in settings}
    sink = written if written is not None else []
    return Judge(HealthConfig(**settings), lambda own: own or others, write=sink.append, **about)


def ask(one: Judge, step: int, loss: float, norm: float = 1.0) -> bool:
    return one.accepts(step, loss, norm, first_sample=10 * step, num_samples=10)


def test_what_is_no_number_is_refused_and_written_down_with_its_samples():
    written: list[Refused] = []
    one = judge(written=written)
    assert ask(one, 1, 2.0)
    assert not ask(one, 2, NAN)
    assert not ask(one, 3, 2.0, norm=math.inf)
    assert ask(one, 4, 2.0)
    assert [(r.step, r.why, r.first_sample, r.num_samples) for r in written] == [
        (2, "loss is nan", 20, 10),
        (3, "gradient norm is inf", 30, 10),
    ]
    assert one.losses == [2.0, 2.0]


def test_a_spike_is_measured_against_the_median_and_does_not_move_it():
    one = judge(spike_sigmas=6.0)
    # eleven values from 2.9 to 3.1: median 3.0, median distance 0.06, so the limit is 3.0 + 6 * 1.4826 * 0.06 = 3.53
    for step in range(44):
        assert ask(one, step, 3.0 + 0.02 * (7 * step % 11 - 5))
    assert not ask(one, 44, 3.6)
    assert not ask(one, 45, 40.0)
    assert ask(one, 46, 3.5)
    # a fall is no spike, and without the option nothing is
    assert ask(one, 47, 0.1)
    assert ask(judge(losses=one.losses), 48, 40.0)
    # equal losses have no spread: a hundredth of the median stands for it
    assert ask(judge(spike_sigmas=6.0, losses=[3.0] * 30), 1, 3.1)
    assert not ask(judge(spike_sigmas=6.0, losses=[3.0] * 30), 1, 3.2)


def test_a_resumed_judge_decides_as_the_one_that_went_on():
    one = judge(spike_sigmas=6.0)
    for step in range(30):
        ask(one, step, 3.0 + 0.01 * (step % 5))
    two = judge(spike_sigmas=6.0, losses=one.losses)
    for loss in (3.05, 3.09, 3.2, 3.5):
        assert ask(one, 31, loss) == ask(two, 31, loss)


def test_a_rank_refuses_with_the_others():
    written: list[Refused] = []
    assert not ask(judge(others=True, written=written), 1, 2.0)
    assert written[0].why == "another rank refused it"


def test_too_many_in_a_row_end_the_run_and_the_next_life_passes_them_over():
    one = judge(max_refused_in_a_row=2)
    assert not ask(one, 5, NAN)
    assert not ask(one, 6, NAN)
    with pytest.raises(BrokenRun, match="the last 3 steps were refused .loss is nan.*from sample 50 on"):
        ask(one, 7, NAN)
    two = judge(max_refused_in_a_row=1, passed_over=(5, 6, 7))
    assert [ask(two, step, 2.0) for step in (4, 5, 6, 7, 8)] == [True, False, False, False, True]


def test_the_step_that_broke_the_weights_is_written_down_and_passed_over_too():
    written: list[Refused] = []
    one = judge(written=written, max_refused_in_a_row=1)
    assert ask(one, 4, 2.0)
    assert not ask(one, 5, NAN)
    with pytest.raises(BrokenRun, match="step 4 before them has broken the weights") as caught:
        ask(one, 6, NAN)
    assert caught.value.broken_step == 4
    assert [(r.step, r.first_sample, r.num_samples) for r in written] == [
        (5, 50, 10),
        (6, 60, 10),
        (4, 40, 10),
    ]
    # where an earlier life made it, this one knows where its batch ended
    written.clear()
    two = judge(written=written, max_refused_in_a_row=1)
    assert not ask(two, 5, NAN)
    with pytest.raises(BrokenRun):
        ask(two, 6, NAN)
    assert (written[-1].step, written[-1].first_sample, written[-1].num_samples) == (4, 40, 10)


def test_the_list_of_refused_steps_is_read_back_also_when_its_last_line_is_torn(tmp_path: Path):
    refused = Refused(
        step=3, why="loss is nan", loss_nats=NAN, grad_norm=1.0, first_sample=30, num_samples=10
    )
    write_refused(tmp_path, refused)
    with (tmp_path / "refused_steps.jsonl").open("a") as stream:
        stream.write('{"step": 4, "wh')
    (record,) = refused_steps(tmp_path)
    assert (record["step"], record["first_sample"], record["loss_nats"]) == (3, 30, "nan")


@pytest.mark.parametrize(
    ("field", "value"),
    [("spike_sigmas", -1.0), ("window_steps", 3), ("max_refused_in_a_row", 0), ("prometheus_port", 70000)],
)
def test_a_setting_out_of_range_is_refused(field: str, value: float):
    with pytest.raises(ValueError, match=rf"health\.{field}={re.escape(str(value))} "):
        HealthConfig(**{field: value})


def test_a_scrape_gets_the_newest_numbers_on_loopback_only():
    with MetricsEndpoint(0, {"run": 'a "b"'}) as endpoint:
        endpoint.update({"loss_nats": 2.5, "grad_norm": NAN, "tokens/python": 3, "name": "no number"})
        endpoint.saved()
        with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/metrics") as answer:
            text = answer.read().decode()
        assert 'm1_loss_nats{run="a \\"b\\""} 2.5\n' in text
        assert 'm1_grad_norm{run="a \\"b\\""} NaN\n' in text
        assert "# TYPE m1_tokens_python gauge\n" in text
        assert "m1_checkpoint_age_s" in text
        assert "no number" not in text
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/")
        assert endpoint._server.server_address[0] == "127.0.0.1"
        with pytest.raises(ValueError, match=f"health.prometheus_port={endpoint.port} cannot be opened"):
            MetricsEndpoint(endpoint.port, {})
