"""Fine-tuning behind pretraining in one run: the loss is on what the assistant says, and falls there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from data_pipeline.config import build_dataset
from megatron_m1.config import load_run
from megatron_m1.model.hybrid import build_model
from megatron_m1.stages import stages_of
from megatron_m1.training.batch import make_microbatch
from megatron_m1.training.spool import read_steps
from megatron_m1.training.step import run_microbatches, wrap_for_gradients
from tests.training import lives
from tests.training.test_data_sources import make_chat_files
from tests.training.tiny_run import write_shards

PRETRAINING, SFT = 4, 24
RUN = """\
name: sft
run_dir: {directory}/run
model:
  {{num_layers: 4, softmax_every: 4, hidden_size: 32, num_heads: 4, num_kv_heads: 4, head_dim: 8, rotary_dim: 4,
    num_experts: 4, ffn_size: 32, vocab_size: 320}}
data:
  tokenizer_path: {directory}/tokenizer/tokenizer.json
  sources:
    - {{name: text, prefix: {directory}/train}}
    - {{name: talks, kind: chat, prefix: {directory}/talks}}
  held_out: [{{name: talks, kind: chat, prefix: {directory}/talks_held_out}}]
training: {{sequence_length: 64, micro_batch_size: 1, precision: fp32, evaluation_rows: 4}}
schedule: {{warmup_steps: 0, batch_ramp: [{{from_tokens: 0, global_batch_tokens: 256}}]}}
checkpoint: {{every_steps: 10}}
tracking: {{enabled: false}}
stages:
  - name: pretraining
    mix: {{weights: {{text: 1}}}}
    training: {{steps: {pretraining}}}
  - name: SFT
    mix: {{weights: {{talks: 1}}}}
    training: {{steps: {sft}}}
    schedule: {{peak_learning_rate: 1.0e-2, min_learning_rate: 1.0e-3, decay: cosine, decay_steps: {sft}}}
"""


@dataclass
class Altered:
    """A row with other labels where nothing is learnt."""

    tokens_S: np.ndarray
    labels_S: np.ndarray
    loss_mask_S: np.ndarray
    document_lengths: object
    sample_id: int


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sft")
    write_shards(directory)
    make_chat_files(directory, "talks")
    make_chat_files(directory, "talks_held_out")
    path = directory / "run.yaml"
    path.write_text(RUN.format(directory=directory, pretraining=PRETRAINING, sft=SFT))
    return path


def rows_of_sft(run_file: Path, count: int):
    """Rows that the second stage reads."""
    stage = stages_of(load_run(run_file))[1]
    data = build_dataset(stage.data, stage.sequence_lengths, stage.config.seed, "train")
    return [data[stage.first.consumed_samples + number] for number in range(count)]


def test_what_is_learnt_is_the_assistants_words_and_the_end_of_its_turn(run_file):
    tokenizer = Tokenizer.from_file(str(run_file.parent / "tokenizer" / "tokenizer.json"))
    for row in rows_of_sft(run_file, 8):
        learnt = np.flatnonzero(row.loss_mask_S)
        runs = np.split(learnt, np.flatnonzero(np.diff(learnt) > 1) + 1)
        texts = {tokenizer.decode(row.labels_S[run].tolist(), skip_special_tokens=False) for run in runs}
        # a row may end within an answer
        assert texts and texts <= {"yes<|end|>", "yes", "y", "ye"}, texts
        assert 0 < len(learnt) < len(row.labels_S) / 2


def test_labels_that_are_not_learnt_change_neither_loss_nor_gradients(alone, run_file):
    rows = rows_of_sft(run_file, 4)
    random = np.random.default_rng(0)
    altered = [
        Altered(
            row.tokens_S,
            np.where(row.loss_mask_S > 0, row.labels_S, random.integers(0, 320, len(row.labels_S))),
            row.loss_mask_S,
            row.document_lengths,
            row.sample_id,
        )
        for row in rows
    ]
    assert all((a.labels_S != b.labels_S).any() for a, b in zip(rows, altered, strict=True))
    chunks = build_model(stages_of(load_run(run_file))[1].config.model, alone, seed=1)
    wrapped = wrap_for_gradients(chunks, alone)
    losses, gradients = [], []
    for given in (rows, altered):
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        batch = [make_microbatch([row], global_rows=4, device=alone.device) for row in given]
        result = run_microbatches(wrapped, batch, alone)
        assert result.loss_tokens == sum(int(row.loss_mask_S.sum()) for row in rows)
        losses.append(result.loss_nats)
        gradients.append([parameter.main_grad.clone() for parameter in chunks[0].parameters()])
    assert losses[0] == losses[1]
    assert all((a == b).all() for a, b in zip(*gradients, strict=True))


@pytest.mark.multiprocess
def test_one_run_pretrains_and_fine_tunes_and_the_assistants_loss_falls(run_file):
    assert lives.start(run_file).wait(300) == 0
    run_dir = run_file.parent / "run"
    steps = read_steps(run_dir / "metrics.jsonl")
    assert list(steps) == list(range(1, PRETRAINING + SFT + 1))
    assert (run_dir / "outcome.txt").read_text() == f"finished at step {PRETRAINING + SFT}\n"
    first, last = steps[PRETRAINING + 1], steps[PRETRAINING + SFT]
    # random weights give ln 320 = 5.8 nats; the answer is always the same
    assert first["loss_nats"] > 4 and last["loss_nats"] < 1, (first["loss_nats"], last["loss_nats"])
    assert first["learning_rate"] > last["learning_rate"]


def test_sft_of_minimax_01_is_its_table():
    *_, extended, short, long = stages_of(load_run("m1-456b-sft-01"))
    expected = {
        # length, rows, first and last learning rate
        "SFT 8K": (8_192, 128, 1e-5, 1e-6),
        "SFT 1M": (1_032_192, 80, 3e-6, 3e-6),
    }
    for stage in (short, long):
        config = stage.config
        length, rows, first, last = expected[stage.name]
        assert config.training.sequence_length == length
        assert config.schedule.batch_ramp[0].global_batch_tokens == rows * length
        assert config.schedule.peak_learning_rate == first
        is_constant = config.schedule.decay == "none"
        assert (first if is_constant else config.schedule.min_learning_rate) == last
        assert is_constant or config.schedule.decay_steps == config.training.steps
        assert config.model.rotary_base == extended.config.model.rotary_base == 1e7
        assert config.layout.world_size == extended.config.layout.world_size
        assert length % (2 * config.layout.cp * config.layout.tp) == 0
        mix = stage.data.stages[stage.index].weights
        chats = {source.title: source for source in stage.data.sources if source.kind == "chat"}
        assert set(mix) <= set(chats) and all(chats[name].max_epochs == 2 for name in mix)
    assert long.data.stages[long.index].weights == {"short chat": 0.5, "long chat": 0.5}


def test_sft_tiny_learns_from_chats_alone_in_its_last_stage():
    pretraining, sft = stages_of(load_run("sft-tiny"))
    assert pretraining.data.stages[0].weights == {"text": 1.0}
    assert sft.data.stages[1].weights == {"chat": 1.0}
    assert sft.config.layout == pretraining.config.layout
