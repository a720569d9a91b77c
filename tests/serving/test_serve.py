"""`m1 serve` speaks OpenAI's interface with our own model, and takes new weights from sharded checkpoints."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from megatron_m1.rl.draw import sample_keys
from megatron_m1.rl.generate import GenerationConfig, Generator, Request
from megatron_m1.rl.remote import Remote, RemoteRefused
from megatron_m1.rl.sample import Prompt
from megatron_m1.serving.http import Server
from tests.serving.served import WINDOW, make_run, post, serving
from tests.spawn import ROOT
from tests.tolerances import GENERATED_LOG_PROB

IDS = [5, 60, 7, 7, 200]


@pytest.fixture(scope="module")
def run(alone, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("served"), alone)


@pytest.fixture(scope="module")
def server(alone, run):
    with serving(run[0].run_dir, alone) as server:
        yield server


def own_samples(run, alone, keys, **options):
    """What the generator gives in this process, with the weights of step 2."""
    config = GenerationConfig(window=WINDOW, end_token=0, slots=4, **options)
    prompt = Prompt(prompt_id=0, tokens_S=np.array(IDS), text="", task="none")
    asked = [Request(prompt=prompt, sample_id=i, key=key, max_tokens=9) for i, key in enumerate(keys)]
    return Generator(run[1], alone, config, version=2, text_of=str).run(asked)


def test_ids_go_in_and_the_generators_tokens_come_out(alone, run, server):
    found = post(
        server,
        "/completions",
        prompt=IDS,
        max_tokens=9,
        seed=-3,
        n=3,
        logprobs=1,
        temperature=0.9,
        return_tokens_as_token_ids=True,
    )
    first = 2**64 - 3
    keys = [first, *(int(sample_keys(first, np.array([0]), np.array([i]))[0]) for i in (1, 2))]
    expected = own_samples(run, alone, keys, temperature=0.9)
    assert len({tuple(sample.tokens_S) for sample in expected}) > 1
    for choice, sample in zip(found["choices"], expected, strict=True):
        assert choice["token_ids"] == sample.tokens_S.tolist()
        assert choice["finish_reason"] == sample.finish
        assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in sample.tokens_S]
        assert np.allclose(choice["logprobs"]["token_logprobs"], sample.log_probs_S, atol=GENERATED_LOG_PROB)
        assert choice["prompt_token_ids"] == IDS
    made = sum(len(sample.tokens_S) for sample in expected)
    assert found["usage"] == {"prompt_tokens": 5, "completion_tokens": made, "total_tokens": 5 + made}
    assert found["system_fingerprint"] == "step_00000002"


def test_texts_and_chats_go_through_tokenizer_and_template(server):
    text = post(server, "/completions", prompt="say yes", max_tokens=4, temperature=0)
    coder = server.model.coder
    (choice,) = text["choices"]
    assert choice["prompt_token_ids"] == coder.tokens("say yes") and choice["logprobs"] is None
    assert choice["text"] == coder.text(choice["token_ids"])
    talk = [{"role": "user", "content": "say <|end|> yes"}]
    chat = post(server, "/chat/completions", messages=talk, max_tokens=4, temperature=0, logprobs=True)
    (choice,) = chat["choices"]
    assert choice["message"]["role"] == "assistant"
    # the name of the end token in what a user says is text; the template's own is the token
    end = coder.chat.end_id
    assert choice["prompt_token_ids"].count(end) == 1
    assert coder.text(choice["prompt_token_ids"]) == "user: say <|end|> yes<|end|>assistant: "
    assert len(choice["logprobs"]["content"]) == len(choice["token_ids"])


def test_a_stream_has_the_same_answer_in_events(server):
    body = {"prompt": IDS, "max_tokens": 5, "seed": 1}
    whole = post(server, "/completions", **body)
    parts = urlsplit(server.url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body | {"stream": True}))
    answer = connection.getresponse()
    assert answer.headers["Content-Type"] == "text/event-stream"
    lines = [line for line in answer.read().decode().split("\n\n") if line]
    connection.close()
    assert lines[-1] == "data: [DONE]"
    (event,) = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert event["choices"] == whole["choices"]


def test_new_weights_are_taken_from_a_checkpoint(run, server):
    root = Remote(url=server.url.removesuffix("/v1"))
    asked = {"prompt": IDS, "max_tokens": 6, "seed": 1, "logprobs": 1}
    newest = post(server, "/completions", **asked)
    directory = run[0].run_dir / "checkpoints"
    told = root.exchange(
        "POST", "/update_weights_from_disk", {"model_path": str(directory / "step_00000001")}
    )
    assert told["success"] and told["weights_step"] == 1
    assert Remote(url=server.url).exchange("GET", "/models", None)["data"][0]["weights_step"] == 1
    older = post(server, "/completions", **asked)
    assert older["system_fingerprint"] == "step_00000001"
    assert older["choices"][0]["logprobs"] != newest["choices"][0]["logprobs"]
    with pytest.raises(RemoteRefused, match="status 400.*no checkpoint: allowed is a directory step_"):
        root.exchange("POST", "/update_weights_from_disk", {"model_path": str(directory)})
    torn = directory / "step_00000009"
    torn.mkdir()
    with pytest.raises(RemoteRefused, match="status 400"):
        root.exchange("POST", "/update_weights_from_disk", {"model_path": str(torn)})
    torn.rmdir()
    # what could not be loaded has changed nothing
    assert post(server, "/completions", **asked)["choices"] == older["choices"]
    root.exchange("POST", "/update_weights_from_disk", {"model_path": str(directory / "step_00000002")})
    assert post(server, "/completions", **asked)["choices"] == newest["choices"]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "prompt is missing"),
        ({"prompt": [[1, "a"]]}, "neither a text nor a list of token ids"),
        ({"prompt": [[1], []]}, "allowed are 1 to 63"),
        ({"prompt": [1] * WINDOW}, "share a window of 64 tokens"),
        ({"prompt": [1], "temperature": -1}, "temperature=-1: allowed are numbers from 0.0"),
        ({"prompt": [1], "n": 0}, "n=0: allowed are whole numbers from 1"),
        ({"prompt": [1], "max_tokens": True}, "max_tokens=True"),
        ({"prompt": [1], "stop": ["x"]}, "stop=.* is not supported"),
        ({"prompt": [1], "logprobs": 5}, "only those of the drawn tokens"),
        ({"prompt": [1], "seed": 2**64}, "a whole number of 64 bits"),
        ({"prompt": [1], "model": "gpt"}, "there is no model 'gpt': this server has 'served'"),
        ({"prompt": [1], "stop_token_ids": [1, 2]}, "one token id is allowed"),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_sentence(server, body, sentence):
    with pytest.raises(RemoteRefused, match=sentence):
        post(server, "/completions", **body)


def test_no_json_and_no_such_place_are_refused(server):
    parts = urlsplit(server.url)
    for path, content, status in (
        ("/v1/completions", b"{", 400),
        ("/v1/completions", b"[1]", 400),
        ("/nowhere", b"{}", 404),
    ):
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
        connection.request("POST", path, content)
        answer = connection.getresponse()
        assert (answer.status, "message" in json.loads(answer.read())["error"]) == (status, True)
        connection.close()


def test_a_burst_of_connections_waits_for_its_threads(server):
    # bound and not started: nobody accepts, so all that connect are waiting
    waiting = Server(server.model, server.desk, "served", "127.0.0.1", 0)
    parts = urlsplit(waiting.url)
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(socket.create_connection((parts.hostname, parts.port), timeout=20))
        with waiting:
            assert Remote(url=waiting.url).exchange("GET", "/models", None)["data"]


@pytest.mark.multiprocess
def test_the_command_serves_on_two_ranks_and_ends_with_a_signal(alone, run, tmp_path):
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "megatron_m1",
        "serve",
        str(run[0].run_dir),
        "layout.tp=2",
    ]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--port", "0", "--slots", "4"], cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "step 2 of" in line and "for this machine only, without authentication" in line, (
            line,
            (tmp_path / "log").read_text(),
        )
        url = next(word.rstrip(",") for word in line.split() if word.startswith("http://127.0.0.1:"))
        remote = Remote(url=url)
        found = remote.exchange(
            "POST", "/completions", {"prompt": IDS, "max_tokens": 9, "seed": 4, "logprobs": 1}
        )
        (expected,) = own_samples(run, alone, [4])
        (choice,) = found["choices"]
        assert choice["token_ids"] == expected.tokens_S.tolist()
        assert np.allclose(
            choice["logprobs"]["token_logprobs"], expected.log_probs_S, atol=GENERATED_LOG_PROB
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()


@pytest.mark.multiprocess
def test_generate_prints_the_prompt_and_what_follows(run, server):
    command = [sys.executable, "-W", "ignore", "-m", "megatron_m1", "generate", str(run[0].run_dir)]
    options = ["--prompt", "say yes", "--max-tokens", "4", "--temperature", "0"]
    found = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    (choice,) = post(server, "/completions", prompt="say yes", max_tokens=4, temperature=0)["choices"]
    assert found.stdout.rstrip("\n") == f"say yes{choice['text']}".rstrip("\n")


def test_a_run_without_a_checkpoint_is_refused(alone, run, tmp_path: Path):
    from megatron_m1.serving.model import Limits, ServedModel, config_of

    config = config_of(str(run[0].run_dir), [f"run_dir={tmp_path / 'empty'}"])
    with pytest.raises(ValueError, match="has no complete checkpoint: a model is served from one"):
        ServedModel(config, alone, Limits(window=8, slots=1))
