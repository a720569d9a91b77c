"""The command line: what it passes on, how it speaks about mistakes, and that only commands that work are
there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_m1 import cli, start

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def trained(monkeypatch):
    """What reaches megatron_m1.start.train, which is replaced by a recorder."""
    calls = []
    monkeypatch.setattr(start, "train", lambda config, *, resume: calls.append((config, resume)))
    return calls


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


def test_the_commands_are_those_that_work():
    help_text = invoke("--help").output
    names = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    assert names == {"train", "serve", "generate", "doctor"}
    assert [group.name for group in cli.app.registered_groups] == ["data", "launch", "ckpt"]
    assert all(name in help_text for name in ("train", "serve", "generate", "data", "doctor"))


def test_train_passes_the_resolved_run_and_resumes_by_default(trained):
    assert invoke("train", "tiny", "training.steps=3", "layout.pp=1").exit_code == 0
    ((config, resume),) = trained
    assert (config.name, config.training.steps, config.layout.pp) == ("tiny", 3, 1)
    assert resume is True


def test_fresh_does_not_resume(trained):
    invoke("train", "tiny", "--fresh")
    assert trained[0][1] is False


def test_a_negative_override_is_a_value_and_not_an_option(trained):
    result = invoke("train", "tiny", "seed=-1")
    assert "seed=-1 is not legal" in str(result.exception)
    assert not trained


def test_explain_prints_every_value_with_its_origin_and_does_not_train(trained):
    output = invoke("train", "tiny", "--explain", "training.steps=3").output
    lines = {line.split()[0]: line.split() for line in output.splitlines() if line.strip()}
    assert lines["training.steps"] == ["training.steps", "3", "override"]
    assert lines["layout.tp"] == ["layout.tp", "2", "preset", "tiny"]
    assert lines["optimizer.beta2"] == ["optimizer.beta2", "0.95", "default"]
    assert not trained


def test_the_demo_data_command_prints_what_was_made(monkeypatch, tmp_path):
    from data_pipeline import prepare

    split = prepare.SplitSummary(prefix="x/train", num_documents=3, num_bytes=1200, num_tokens=400)
    summary = prepare.DemoSummary(
        tokenizer_path="x/tokenizer.json",
        vocab_size=4096,
        train=split,
        held_out=split,
        num_conversations={"train": 7, "held_out": 2},
        unigram_entropy_nats_per_token=6.25,
        parts_reused=(),
    )

    def fake(directory, progress):
        progress("corpus", 0, 2)
        progress("corpus", 2, 2)
        assert directory == tmp_path
        return summary

    monkeypatch.setattr(prepare, "prepare_demo", fake)
    output = invoke("data", "demo", "--directory", str(tmp_path)).output
    assert "1,200 bytes, 400 tokens" in output
    assert "6.2500 nats" in output


def run_main(monkeypatch, error: Exception) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    cli.main()


def test_a_users_mistake_prints_its_message_and_exits_2(monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, ValueError("layout.pp=3 does not divide"))
    assert caught.value.code == 2
    assert capsys.readouterr().err == "m1: layout.pp=3 does not divide\n"


@pytest.mark.parametrize(
    "error", [RuntimeError("ours"), UnicodeDecodeError("utf-8", b"x", 0, 1, "ours"), KeyError("k")]
)
def test_every_other_exception_keeps_its_traceback(monkeypatch, error):
    with pytest.raises(type(error)):
        run_main(monkeypatch, error)


def test_the_module_runs_as_a_command_and_a_mistake_has_no_traceback():
    command = [sys.executable, "-m", "megatron_m1", "train", "tinny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "did you mean 'tiny'" in done.stderr
    assert "Traceback" not in done.stderr


def test_importing_the_main_module_starts_nothing():
    """A checkpoint save starts processes that import the main module again."""
    command = [sys.executable, "-c", "import megatron_m1.__main__, sys; print('torch' in sys.modules)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "False\n")


def test_data_prepare_encodes_files_into_a_shard_that_can_be_read(tmp_path):
    from data_pipeline.index import TokenShard
    from data_pipeline.tokenize import DocumentEncoder, train_byte_level_bpe

    texts = ["one document of text", "another document", ""]
    train_byte_level_bpe(texts, 280, tmp_path / "tokenizer.json")
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    options = ["--prefix", str(tmp_path / "shard"), "--tokenizer", str(tmp_path / "tokenizer.json")]
    done = invoke("data", "prepare", str(tmp_path / "raw.jsonl"), "--text-field", "body", *options)
    assert done.exit_code == 0, done.output
    assert "1 files, 2 documents, 36 bytes" in done.output
    shard = TokenShard(tmp_path / "shard")
    encoder = DocumentEncoder(tmp_path / "tokenizer.json")
    first = next(iter(encoder.encode(texts[:1])))
    assert list(shard.document(0)) == list(first)


def test_whoever_only_reads_a_run_file_or_starts_ranks_does_not_load_megatron_core():
    program = (
        "import sys; import megatron_m1.cli, megatron_m1.start, parallel.launch; "
        "from megatron_m1.config import load_run; load_run('rl-tiny'); print('megatron.core' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "False\n"
