"""`m1 train` on every kind of source at once; the data's rules hold in a real run, killed and resumed otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from data_pipeline.chat import prepare_chat
from data_pipeline.config import build_dataset
from data_pipeline.index import ShardWriter
from data_pipeline.loader import sample_ids_hash
from data_pipeline.tokenize import train_byte_level_bpe
from megatron_m1.config import load_run
from megatron_m1.saves import data_of
from megatron_m1.stages import stages_of
from megatron_m1.training.spool import read_steps
from tests import tolerances
from tests.training.lives import kill, start, wait_for_step
from tests.training.tiny_run import write_shards

pytestmark = pytest.mark.multiprocess

STEPS, ROWS = 8, 8
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
RUN = """\
name: mixed
run_dir: {directory}/run
model:
  {{num_layers: 8, hidden_size: 32, num_heads: 4, num_kv_heads: 4, head_dim: 8, rotary_dim: 4, num_experts: 4,
    ffn_size: 32, vocab_size: 320}}
data:
  tokenizer_path: {directory}/tokenizer/tokenizer.json
  document_multiple: 8
  sources:
    - {{name: text, prefix: {directory}/train, max_epochs: 4}}
    - {{name: talks, kind: chat, prefix: {directory}/talks, max_epochs: 2}}
    - {{name: copies, kind: synthetic, task: copy, length_tokens: 64}}
  stages:
    - {{tokens: 2048, weights: {{text: 1}}}}
    - {{weights: {{talks: 2, copies: 1, text: 1}}, transition_tokens: 1024}}
  held_out: [{{prefix: {directory}/held_out}}]
training: {{steps: {steps}, sequence_length: 128, micro_batch_size: 1, precision: fp32, evaluation_rows: 4}}
schedule: {{peak_learning_rate: 3.0e-3, batch_ramp: [{{from_tokens: 0, global_batch_tokens: 1024}}]}}
checkpoint: {{every_steps: 2, keep: 3}}
tracking: {{enabled: false}}
"""


def make_chat_files(tmp_path: Path, name: str) -> None:
    """A tokenizer with a chat template, and a shard of 60 equal conversations."""
    directory = tmp_path / "tokenizer"
    directory.mkdir(exist_ok=True)
    train_byte_level_bpe(["user assistant say yes no amber birch copper"], 290, directory / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<|start|>", "<|end|>")])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    talk = [{"role": "user", "content": "say yes"}, {"role": "assistant", "content": "yes"}]
    (tmp_path / f"{name}.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 60)
    prepare_chat([tmp_path / f"{name}.jsonl"], tmp_path / name, directory)


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    write_shards(tmp_path)
    make_chat_files(tmp_path, "talks")
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(directory=tmp_path, steps=STEPS))
    return path


def test_a_mixed_run_killed_and_resumed_with_another_front_and_microbatch_reads_the_same(
    run_file: Path,
) -> None:
    undisturbed = run_file.with_name("undisturbed.yaml")
    undisturbed.write_text(run_file.read_text().replace("/run\n", "/undisturbed\n"))
    assert start(undisturbed).wait(300) == 0
    life = start(run_file)
    wait_for_step(run_file.with_name("run"), life, 4)
    kill(life)
    text = run_file.read_text().replace("micro_batch_size: 1", "micro_batch_size: 4")
    run_file.write_text(text.replace("data:\n", "data:\n  front: thread\n"))
    assert start(run_file).wait(300) == 0
    ours, theirs = (read_steps(run_file.with_name(name) / "metrics.jsonl") for name in ("run", "undisturbed"))
    config = load_run(run_file)
    dataset = build_dataset(config.data, 128, config.seed, "train")
    sources = set()
    for step in range(1, STEPS + 1):
        samples = range((step - 1) * ROWS, step * ROWS)
        assert ours[step]["sample_ids_hash"] == theirs[step]["sample_ids_hash"] == sample_ids_hash(samples)
        assert ours[step]["loss_nats"] == pytest.approx(theirs[step]["loss_nats"], rel=10 * tolerances.LOSS)
        # What is learnt is what the rows say: the assistant's turns, the answers, and all of the text.
        assert ours[step]["loss_tokens"] == sum(int(dataset[sample].loss_mask_S.sum()) for sample in samples)
        sources |= {dataset.locate(sample).source for sample in samples}
    assert sources == {0, 1, 2}


def test_too_little_data_and_a_shard_that_was_made_anew_are_refused(run_file: Path) -> None:
    from megatron_m1 import run

    source = f"data.sources=[{{name: text, prefix: {run_file.with_name('train')}, max_epochs: 1}}]"
    [short] = stages_of(load_run(run_file, [source, "data.stages=[]", "training.steps=500"]))
    with pytest.raises(ValueError) as caught:
        run._Rows(short)
    assert "stage 'train' ends with sample 4000, but the data has 2" in str(caught.value)
    assert "raise max_epochs or data.stages.tokens, add a source, or take fewer training.steps" in str(
        caught.value
    )
    [stage] = stages_of(load_run(run_file))
    saved = {"data": json.loads(json.dumps(data_of(stage)))}
    run._refuse_other_data(stage, saved)
    with ShardWriter(run_file.with_name("train"), 128) as writer:
        for _ in range(400):
            writer.add_document([5] * 75)
    with pytest.raises(
        ValueError, match="the data's sources is .*; set sources back, or start anew with --fresh"
    ):
        run._refuse_other_data(stage, saved)
