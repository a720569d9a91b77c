"""`m1 data pass-rate`: a run and a server of it give the rates that the generator gives; a killed one goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_m1 import cli
from megatron_m1.rl.draw import sample_keys
from megatron_m1.rl.engine_config import HttpEngineConfig
from megatron_m1.rl.generate import GenerationConfig, Generator, Request
from megatron_m1.rl.pass_rate import PassRateConfig, Rate
from megatron_m1.rl.sample import Prompt
from megatron_m1.serving import rating
from tests.rl.rewards.judge_server import JudgeServer
from tests.serving.served import WINDOW, make_run, serving
from tests.spawn import ROOT

SAMPLES, SEED, TEMPERATURE, MOST = 6, 3, 0.3, 2
TEXTS = ["say yes", "no", "amber birch", "user say", "copper", "assistant", "yes no yes", "birch"]
SETTINGS = [f"rate.samples={SAMPLES}", f"rate.seed={SEED}", f"rate.temperature={TEMPERATURE}"]
SETTINGS += [f"rate.max_tokens={MOST}", "rate.above=0.2", "rate.below=0.8", "rate.workers=1"]
OPTIONS = ["--reward", "exact", *SETTINGS]


@pytest.fixture(scope="module")
def run(alone, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("rated"), alone)


@pytest.fixture(scope="module")
def server(alone, run):
    with serving(run[0].run_dir, alone) as server:
        yield server


@pytest.fixture(scope="module")
def prompts(alone, run, server, tmp_path_factory) -> tuple[Path, list[float]]:
    """A file whose answers are what the model says first, and the pass rate of each, counted here."""
    coder = server.model.coder
    config = GenerationConfig(window=WINDOW, end_token=coder.end_token, slots=4, temperature=TEMPERATURE)
    lines, rates = [], []
    for number, text in enumerate(TEXTS):
        tokens_S = np.array(coder.tokens(text), dtype=np.int64)
        prompt = Prompt(prompt_id=number, tokens_S=tokens_S, text=text, task="none")
        keys = sample_keys(SEED, np.full(SAMPLES, number), np.arange(SAMPLES)).tolist()
        asked = [
            Request(prompt=prompt, sample_id=sample, key=key, max_tokens=MOST)
            for sample, key in enumerate(keys)
        ]
        found = Generator(run[1], alone, config, version=2, text_of=coder.text).run(asked)
        said = [coder.text([t for t in one.tokens_S if t != coder.end_token]).split() for one in found]
        answer = max((words for words in said if words), key=said.count, default=["nothing"])
        answer = ["never"] if text == TEXTS[-1] else answer
        lines.append({"prompt": text, "answer": answer, "id": f"q{number}"})
        rates.append(said.count(answer) / SAMPLES)
    assert len(set(rates)) > 2 and any(0.2 < rate < 0.8 for rate in rates), rates
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path, rates


def invoke(*arguments: object):
    return CliRunner().invoke(cli.app, ["data", "pass-rate", *map(str, arguments)])


def by(server) -> list[str]:
    return ["--by", server.url, "--model", "served"]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_rated(out: Path, prompts: tuple[Path, list[float]]) -> None:
    """Both files together are the prompts, each with the rate that was counted by hand, in the right one."""
    kept, dropped = read(out), read(out.with_suffix(".dropped.jsonl"))
    rates = {line["id"]: line["pass_rate"] for line in [*kept, *dropped]}
    assert rates == {f"q{number}": rate for number, rate in enumerate(prompts[1])}
    assert [line["id"] for line in kept] == [f"q{n}" for n, r in enumerate(prompts[1]) if 0.2 < r < 0.8]
    assert len(kept) + len(dropped) == len(TEXTS)


def test_a_server_is_asked_and_prompts_within_the_bounds_are_kept(server, prompts, tmp_path) -> None:
    out = tmp_path / "kept.jsonl"
    result = invoke(prompts[0], *by(server), "--out", out, *OPTIONS)
    assert result.exit_code == 0, result.output
    assert_rated(out, prompts)
    rows = [line.split()[:3] for line in result.output.splitlines()]
    assert ["kept", str(len(read(out))), f"{len(read(out)) / len(TEXTS):.1%}"] in rows, result.output
    assert ["too", "hard", "1"] in rows and f"{len(TEXTS) * SAMPLES} answers" in result.output
    # other bounds cost no answer: nobody is there to give one
    with JudgeServer() as other:
        told = (
            out.with_suffix(".rates.jsonl")
            .read_text()
            .replace(f"served at {server.url}", "judge at " + other.url)
        )
        out.with_suffix(".rates.jsonl").write_text(told)
        options = [*OPTIONS, "rate.above=-1", "rate.below=2"]
        again = invoke(prompts[0], "--by", other.url, "--model", "judge", "--out", out, *options)
        assert again.exit_code == 0 and not other.seen["POST /v1/completions"], again.output
    assert len(read(out)) == len(TEXTS)


@pytest.mark.multiprocess
def test_a_run_gives_the_same_rates_on_two_ranks_and_its_kept_file_is_a_source(
    run, prompts, tmp_path
) -> None:
    from megatron_m1.rl.prompts import PromptSource, read_questions

    out = tmp_path / "kept.jsonl"
    command = [sys.executable, "-W", "ignore", "-m", "megatron_m1", "data", "pass-rate", str(prompts[0])]
    command += ["layout.tp=2", "--by", str(run[0].run_dir), "--out", str(out), "rate.at_once=8", *OPTIONS]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert_rated(out, prompts)
    questions = list(read_questions(PromptSource(name="kept", path=str(out), reward="exact")))
    assert [question.text for question in questions] == [line["prompt"] for line in read(out)]


def test_a_killed_rating_goes_on_and_asks_for_nothing_twice(server, prompts, tmp_path) -> None:
    out = tmp_path / "kept.jsonl"
    record = out.with_suffix(".rates.jsonl")
    command = [sys.executable, "-W", "ignore", "-m", "megatron_m1", "data", "pass-rate", str(prompts[0])]
    command += [*by(server), "--out", str(out), "rate.at_once=1", *OPTIONS]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not record.exists() or record.read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    known = record.read_bytes().count(b"\n") - 1
    # a kill may come within a line
    record.write_bytes(record.read_bytes() + b'{"number": 7, "pas')
    assert not out.exists()
    result = invoke(prompts[0], *by(server), "--out", out, *OPTIONS)
    assert result.exit_code == 0, result.output
    assert_rated(out, prompts)
    numbers = [line["number"] for line in read(record)[1:]]
    assert numbers == list(range(len(TEXTS))) and 2 <= known <= len(TEXTS)


def test_settings_that_differ_from_the_record_are_refused(server, prompts, tmp_path) -> None:
    out = tmp_path / "kept.jsonl"
    assert invoke(prompts[0], *by(server), "--out", out, *OPTIONS).exit_code == 0
    with pytest.raises(ValueError, match="was made with seed 3 instead of 4: rates of two settings"):
        raise invoke(prompts[0], *by(server), "--out", out, *OPTIONS, "rate.seed=4").exception
    out.with_suffix(".rates.jsonl").write_text("no record\n")
    with pytest.raises(ValueError, match="cannot be used .JSONDecodeError.*choose another --out"):
        raise invoke(prompts[0], *by(server), "--out", out, *OPTIONS).exception


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--reward", "grade"],
            "--reward 'grade' gives no pass rate: allowed are exact, math, logic, code, soft",
        ),
        (["rate.place=end"], "place='end' is not legal: .*'boxed', 'last_line' or 'whole'"),
        (["rate.sample=3"], "unknown key 'sample': did you mean 'samples'"),
        (["rate.above=0.9"], "strictly between rate.above=0.9 and rate.below=0.8 do not exist"),
        (["rate.samples=0"], "rate.samples=0 is no count"),
        (["layout.tp=2"], "layout.tp=2 and --by http.*only rate.FIELD=VALUE is allowed"),
        (["--model", ""], "names a server and --model is empty"),
        (["--model", "gpt"], r"has no model 'gpt': it serves \['judge'\]; correct --by.model"),
        (["--reward", "math"], "prompt 0 of task 'prompts' has answer .*: allowed is a number"),
    ],
)
def test_what_cannot_be_rated_is_refused_with_a_sentence(prompts, tmp_path, options, sentence) -> None:
    with JudgeServer() as server:
        first = ["--by", server.url, "--model", "judge", "--out", tmp_path / "kept.jsonl", *OPTIONS]
        with pytest.raises(ValueError, match=sentence):
            raise invoke(prompts[0], *first, *options).exception
        assert not server.seen["POST /v1/completions"]


def test_the_prompts_are_not_written_over(prompts) -> None:
    with pytest.raises(ValueError, match="is the file of prompts itself"):
        raise invoke(prompts[0], "--by", "tiny", "--out", prompts[0], *OPTIONS).exception


def test_files_without_prompts_and_runs_without_weights_are_refused(run, tmp_path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    options = ["--by", run[0].run_dir, "--out", tmp_path / "kept.jsonl", *OPTIONS]
    with pytest.raises(ValueError, match="has 0 prompts: it needs 1 or more"):
        raise invoke(empty, *options).exception
    with pytest.raises(ValueError, match="cannot be read .*it is a JSONL file; check the path"):
        raise invoke(tmp_path / "nowhere.jsonl", *options).exception


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (503, "refused with status 503"),
        ("text", "sent no JSON"),
        ("no choices", "sent no choice with a text"),
    ],
)
def test_a_server_that_is_down_or_answers_nonsense_ends_it_and_nothing_is_rated(
    prompts, tmp_path, fault, sentence
) -> None:
    out = tmp_path / "kept.jsonl"
    asked = rating.Rating(prompts=prompts[0], reward="exact", out=out)
    with JudgeServer(always=fault) as server:
        endpoint = HttpEngineConfig(url=server.url, model="judge", wait_s=0.0)
        with pytest.raises(
            ValueError, match=f"does not answer after 3 attempts: {server.url} {sentence}"
        ) as told:
            rating.rate_by_server(asked, endpoint, lambda *_: None)
    assert "it goes on from what is on record" in str(told.value)
    assert len(read(out.with_suffix(".rates.jsonl"))) == 1 and not out.exists()


def test_rates_are_strictly_between_the_bounds_and_failures_are_not_wrong_answers() -> None:
    config = PassRateConfig(samples=4, above=0.0, below=0.9)

    def found(passed: int, judged: int, **failures: int) -> tuple[float | None, str]:
        rate = Rate(number=0, passed=passed, judged=judged, cut=0, failures=failures)
        return rate.pass_rate, rate.fate(config)

    assert found(0, 4) == (0.0, "too hard")
    assert found(1, 4) == (0.25, "kept")
    assert found(9, 10) == (0.9, "too easy") and found(4, 4) == (1.0, "too easy")
    # two timed out: half of what was judged passed
    assert found(1, 2, timeout=2) == (0.5, "kept")
    assert found(1, 1, error=3) == (None, "no verdict") == found(0, 0, error=4)
