"""What is measured of a run's health: hand-made loads of experts, and a real run whose scrape names a planted straggler
and shows every number that the record has."""

from __future__ import annotations

import re
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch

from data_pipeline.loader import sample_ids_hash
from megatron_m1.training.health import refused_steps
from megatron_m1.training.spool import read_steps
from megatron_m1.training.step import StepResult
from tests.faults.life import WORLD_SIZE, Life, Planted
from tests.training.tiny_run import SMALLEST, data_in, write_run_file, write_shards

STEPS, SURVEY_EVERY, SAVE_EVERY, LAST_SAVE, BAD_STEP = 8, 3, 4, 4, 2
POOR_RANK = 2


def load(tokens_per_expert: list[list[float]], ep: int, dropped: float = 0.0) -> dict[str, float]:
    result = StepResult(
        loss_nats=0.0,
        loss_tokens=1,
        auxiliary_loss=0.0,
        tokens_per_expert_LE=torch.tensor(tokens_per_expert, dtype=torch.float32),
        dropped_share=dropped,
    )
    return result.expert_load(ep)


def test_the_load_of_experts_by_hand() -> None:
    # two layers of four experts; on two ranks the first layer has 40 and 20 tokens, the second 30 and 30
    assert load([[30, 10, 10, 10], [15, 15, 15, 15]], ep=2, dropped=0.25) == pytest.approx(
        {
            "dropped_share": 0.25,
            "busiest_expert_over_mean": 2.0,
            "busiest_ep_rank_over_mean": 40 / 30,
            "busiest_ep_rank_tokens": 40,
            "expert_share/0": 45 / 120,
            "expert_share/1": 25 / 120,
            "expert_share/2": 25 / 120,
            "expert_share/3": 25 / 120,
        }
    )
    # the worst layer counts, not the sum of all
    assert load([[8, 0], [0, 8]], ep=1)["busiest_expert_over_mean"] == 2.0
    # nothing was routed at all
    assert set(load([[0, 0]], ep=2).values()) == {0.0}


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The last scrape of a run with a poor rank, a bad step and room for a quarter of the choices; its directory."""
    directory = tmp_path_factory.mktemp("vitals")
    write_shards(directory)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run_file = write_run_file(
        directory / "run",
        data_in(directory),
        steps=STEPS,
        **SMALLEST
        | {
            "model": SMALLEST["model"] | {"capacity_factor": 0.25},
            "layout": {"tp": 2, "pp": 1, "ep": 2},
            "health": {"prometheus_port": port},
            "checkpoint": {"every_steps": SAVE_EVERY},
        },
    )
    planted = Planted(
        rank=POOR_RANK,
        times_as_slow=20,
        free_memory_gib=0.5,
        nan_at_step=BAD_STEP,
        survey_every_steps=SURVEY_EVERY,
        seconds_per_step=0.3,
    )
    life, text = Life(run_file, directory / "logs", planted), ""
    while any(process.exitcode is None for process in life.ranks):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                text = answer.read().decode()
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.05)
    assert life.wait() == [0] * WORLD_SIZE, life.said()
    return text, directory / "run"


def values_in(text: str) -> dict[str, float]:
    return {
        name: float(value) for name, value in re.findall(r"^m1_(\w+)\{.*\} (\S+)$", text, flags=re.MULTILINE)
    }


@pytest.mark.multiprocess
def test_a_scrape_shows_what_the_record_has_of_the_same_step(scraped: tuple[str, Path]) -> None:
    shown, record = values_in(scraped[0]), read_steps(scraped[1] / "metrics.jsonl")
    step = int(shown["step"])
    assert step > LAST_SAVE
    numbers = {name: value for name, value in record[step].items() if isinstance(value, float | int)}
    for name, value in numbers.items():
        if name not in ("life", "time_ms", "checkpoint_age_s"):
            assert shown[name.replace("/", "_")] == value, name
    assert {
        "dropped_share",
        "busiest_ep_rank_tokens",
        "busiest_expert_over_mean",
        "expert_share/3",
    } <= numbers.keys()


@pytest.mark.multiprocess
def test_the_planted_straggler_and_the_full_rank_are_named(scraped: tuple[str, Path]) -> None:
    record = read_steps(scraped[1] / "metrics.jsonl")
    surveyed = [step for step, values in record.items() if "slowest_rank" in values]
    # the numbers of a survey come with the step after it
    assert surveyed == [step + 1 for step in range(SURVEY_EVERY, STEPS, SURVEY_EVERY)]
    for values in (values_in(scraped[0]), *(record[step] for step in surveyed)):
        assert values["slowest_rank"] == POOR_RANK
        assert values["slowest_rank_over_median"] > 3
        assert values["num_slow_ranks"] >= 1
        assert (values["least_free_memory_rank"], values["least_free_memory_gib"]) == (POOR_RANK, 0.5)


@pytest.mark.multiprocess
def test_a_refused_step_is_on_record_with_the_batch_that_it_read(scraped: tuple[str, Path]) -> None:
    (refused,) = refused_steps(scraped[1])
    record = read_steps(scraped[1] / "metrics.jsonl")
    assert refused["step"] == BAD_STEP
    # the two numbers are all that is needed to read the batch again
    batch = range(refused["first_sample"], refused["first_sample"] + refused["num_samples"])
    assert sample_ids_hash(list(batch)) == record[BAD_STEP]["sample_ids_hash"]
    assert [step for step, values in record.items() if values["update_refused"]] == [BAD_STEP]
    assert values_in(scraped[0])["refused_steps"] == 1


@pytest.mark.multiprocess
def test_load_and_drops_are_those_of_the_capacity(scraped: tuple[str, Path]) -> None:
    for values in read_steps(scraped[1] / "metrics.jsonl").values():
        # every expert is full: a quarter of its even share
        assert values["dropped_share"] == pytest.approx(0.75)
        assert [values[f"expert_share/{expert}"] for expert in range(4)] == [0.25] * 4
        # 128 tokens with two choices each, a quarter of them kept, on two ranks
        assert values["busiest_ep_rank_tokens"] == 128 * 2 / 4 / 2
        assert (values["busiest_expert_over_mean"], values["busiest_ep_rank_over_mean"]) == (1.0, 1.0)


@pytest.mark.multiprocess
def test_the_age_of_the_newest_checkpoint_grows_from_its_save(scraped: tuple[str, Path]) -> None:
    record = read_steps(scraped[1] / "metrics.jsonl")
    assert all("checkpoint_age_s" not in record[step] for step in range(1, SAVE_EVERY + 1))
    ages = [record[step]["checkpoint_age_s"] for step in range(LAST_SAVE + 1, STEPS + 1)]
    assert ages == sorted(ages)
    # at least as long as the steps since then were held up
    assert ages[-1] >= 0.3 * (STEPS - LAST_SAVE)
    assert values_in(scraped[0])["checkpoint_age_s"] > 0


def test_free_memory_is_the_machines_where_ranks_run_on_cpus() -> None:
    from megatron_m1.vitals import _free_gib

    assert 0 < _free_gib(torch.device("cpu")) <= psutil.virtual_memory().total / 2**30
