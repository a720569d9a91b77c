"""Generation over HTTP is generation: same tokens and log-probabilities; and a server's faults are counted errors."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest

from megatron_m1.rl.engine_config import HttpEngineConfig
from megatron_m1.rl.generate import GenerationConfig, Generator, Request
from megatron_m1.rl.http_engine import EngineError, HttpEngine
from megatron_m1.rl.stop import RepetitionConfig, RepetitionStop, repeats_at
from megatron_m1.training.weights import WeightsExport
from tests.rl import generate_ranks
from tests.rl.rewards.judge_server import JudgeServer
from tests.serving.served import WINDOW, make_run, serving
from tests.tolerances import GENERATED_LOG_PROB

DRAWING = GenerationConfig(window=WINDOW, end_token=0, slots=4, seed=11, temperature=0.9, top_p=0.95)


@pytest.fixture(scope="module")
def run(alone, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("served"), alone)


@pytest.fixture(scope="module")
def server(alone, run):
    with serving(run[0].run_dir, alone) as server:
        yield server


def engine_at(url: str, publish=lambda version: Path(), **options) -> HttpEngine:
    config = HttpEngineConfig(url=url, model=options.pop("model", "served"), wait_s=0.0, **options)
    return HttpEngine(config, DRAWING, text_of=str, publish=publish)


def at_step_2(run, server, **options) -> HttpEngine:
    checkpoints = run[0].run_dir / "checkpoints"
    return engine_at(server.url, lambda version: checkpoints / f"step_{version:08d}", **options)


def test_the_engine_gives_the_generators_samples(alone, run, server):
    asked = generate_ranks.requests()
    found = at_step_2(run, server).generate(asked, window=WINDOW, version=2, max_passes=None)
    expected = Generator(run[1], alone, DRAWING, version=2, text_of=str).run(asked)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.prompt_id, ours.sample_id, ours.finish) == (
            theirs.prompt_id,
            theirs.sample_id,
            theirs.finish,
        )
        assert (ours.tokens_S == theirs.tokens_S).all(), ours.prompt_id
        assert np.allclose(ours.log_probs_S, theirs.log_probs_S, atol=GENERATED_LOG_PROB)
        assert (ours.versions_S == 2).all()


def test_new_weights_are_published_and_pushed_before_they_generate(alone, run, server, tmp_path):
    # a trainer whose weights moved on: written as shards, loaded by the server
    chunks = generate_ranks.build(alone, model=run[0].model)
    export = WeightsExport(tmp_path / "weights", chunks, alone)
    engine = engine_at(server.url, export)
    asked = generate_ranks.requests(1)
    found = engine.generate(asked, window=WINDOW, version=7, max_passes=None)
    assert server.model.step == 7
    expected = Generator(chunks, alone, DRAWING, version=7, text_of=str).run(asked)
    assert [s.tokens_S.tolist() for s in found] == [s.tokens_S.tolist() for s in expected]
    with pytest.raises(EngineError, match="did not load the weights of step 8 from .*no checkpoint"):
        engine_at(server.url, lambda version: tmp_path).generate(
            asked, window=WINDOW, version=8, max_passes=None
        )


def test_a_cut_sample_carries_on_with_other_random_numbers(run, server):
    engine = at_step_2(run, server)
    asked = generate_ranks.requests(1)
    cut = engine.generate(asked, window=WINDOW, version=2, max_passes=3)
    unfinished = [(a, b) for a, b in zip(asked, cut, strict=True) if b.finish is None]
    assert unfinished and all(len(sample.tokens_S) == 3 for _, sample in unfinished)
    on = [Request(prompt=a.prompt, sample_id=a.sample_id, earlier=b) for a, b in unfinished]
    rest = engine.generate(on, window=WINDOW, version=2, max_passes=None)
    for (_, before), sample in zip(unfinished, rest, strict=True):
        assert sample.finish in ("stop", "length") and len(sample.tokens_S) > 3
        assert (sample.tokens_S[:3] == before.tokens_S).all()
        assert (sample.log_probs_S[:3] == before.log_probs_S).all()
        assert len(sample.versions_S) == len(sample.tokens_S)


def test_a_server_with_a_smaller_window_is_found_out(run, server):
    with pytest.raises(EngineError, match="status 400.*max_tokens=|smaller than ours"):
        at_step_2(run, server).generate(
            generate_ranks.requests(1), window=2 * WINDOW, version=2, max_passes=None
        )


def test_a_server_that_is_not_there_or_has_another_model_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(EngineError, match=f"no engine at rl.engine.url='http://127.0.0.1:{port}/v1'"):
        engine_at(f"http://127.0.0.1:{port}/v1")
    with (
        JudgeServer() as server,
        pytest.raises(EngineError, match=r"no model 'served': it serves \['judge'\]"),
    ):
        engine_at(server.url)
    with (
        JudgeServer() as server,
        pytest.raises(EngineError, match=r"is not asked, since key_file='/nowhere' cannot be read"),
    ):
        engine_at(server.url, model="judge", key_file="/nowhere")
    assert not server.seen


@pytest.mark.parametrize(
    ("fault", "counts", "sentence"),
    [
        ("text", {"requests": 3, "unavailable": 0, "unreadable": 3, "failed": 1}, "sent no JSON"),
        (
            "no choices",
            {"requests": 3, "unavailable": 0, "unreadable": 3, "failed": 1},
            "no choice with token ids",
        ),
        (503, {"requests": 3, "unavailable": 3, "unreadable": 0, "failed": 1}, "refused with status 503"),
        ("cut", {"requests": 3, "unavailable": 3, "unreadable": 0, "failed": 1}, "RemoteDisconnected"),
        # no second attempt changes a refusal
        (400, {"requests": 1, "unavailable": 1, "unreadable": 0, "failed": 1}, "refused with status 400"),
    ],
)
def test_faults_are_tried_again_counted_and_end_the_call(fault, counts, sentence):
    with JudgeServer(always=fault) as server:
        engine = engine_at(server.url, model="judge")
        with pytest.raises(EngineError, match=f"1 of 1 samples failed.*{sentence}"):
            engine.generate(generate_ranks.requests(1)[:1], window=WINDOW, version=0, max_passes=None)
        assert engine.counts() == counts
        assert engine.metrics()["engine_requests"] == counts["requests"]


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        (
            {"token_ids": [4, 0], "finish_reason": "stop", "logprobs": {"token_logprobs": [-1.0]}},
            "2 tokens and 1 log",
        ),
        (
            {"token_ids": [4, 5], "finish_reason": "stop", "logprobs": {"token_logprobs": [-1, -1]}},
            "after token 5",
        ),
        (
            {"token_ids": [0], "finish_reason": "abort", "logprobs": {"token_logprobs": [-1]}},
            "ended with 'abort'",
        ),
        (
            {"token_ids": [0], "finish_reason": "stop", "logprobs": {"token_logprobs": [float("nan")]}},
            "no numbers",
        ),
        (
            {"finish_reason": "stop", "logprobs": {"tokens": ["yes"], "token_logprobs": [-1]}},
            "token 'yes' is no id",
        ),
        (
            {"token_ids": [4], "finish_reason": "length", "logprobs": {"token_logprobs": [-1]}},
            "smaller than ours",
        ),
    ],
)
def test_answers_that_cannot_be_are_no_samples(choice, sentence):
    with JudgeServer(always={"choices": [choice]}) as server:
        engine = engine_at(server.url, model="judge", attempts=1)
        with pytest.raises(EngineError, match=sentence):
            engine.generate(generate_ranks.requests(1)[:1], window=WINDOW, version=0, max_passes=None)
        assert engine.counts() == {"requests": 1, "unavailable": 0, "unreadable": 1, "failed": 1}


def test_the_repetition_stop_cuts_a_whole_sample_where_it_would_have_cut_a_growing_one():
    import torch

    config = RepetitionConfig(tokens=4, full_window_tokens=1, least_tokens=1)
    random = np.random.default_rng(0)
    for _ in range(200):
        log_probs_S = np.where(random.random(30) < 0.7, -1e-4, -1.0).astype(np.float32)
        stop = RepetitionStop(config, window_tokens=64, slots=1, device=torch.device("cpu"))
        ended = [bool(stop.update(torch.tensor([value]))) for value in log_probs_S]
        expected = ended.index(True) + 1 if any(ended) else None
        assert repeats_at(config, 64, log_probs_S) == expected
    assert repeats_at(RepetitionConfig(tokens=0), 64, log_probs_S) is None
