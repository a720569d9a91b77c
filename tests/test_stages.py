"""Stages of a run: where they begin, what they may change, and that a run killed between two goes on exactly."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import build_dataset
from data_pipeline.index import ShardWriter
from megatron_m1.config import RunConfig, load_run
from megatron_m1.saves import data_of
from megatron_m1.stages import stages_of
from megatron_m1.training.position import Position

RUN = """
preset: tiny
name: staged
schedule:
  warmup_steps: 2
  decay: none
  decay_steps: 0
  batch_ramp: [{from_tokens: 0, global_batch_tokens: 1024}, {from_tokens: 4096, global_batch_tokens: 2048}]
stages:
  - name: short
    training: {steps: 6, sequence_length: 128}
  - name: long
    mix: {transition_tokens: 2048}
    model: {rotary_base: 40000.0}
    layout: {tp: 1, pp: 2, cp: 2, ep: 2}
    training: {steps: 4, sequence_length: 256, micro_batch_size: 2}
    schedule: {peak_learning_rate: 1.0e-3, batch_ramp: [{from_tokens: 0, global_batch_tokens: 2048}]}
"""


@pytest.fixture
def load(tmp_path: Path):
    def load(*overrides: str, text: str = RUN) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return load_run(path, overrides)

    return load


def test_steps_samples_and_tokens_count_through_the_run(load) -> None:
    short, long = stages_of(load())
    assert short.first == Position()
    # four steps of 1024 tokens, then two of 2048, in rows of 128
    assert short.last == Position(6, 4 * 8 + 2 * 16, 4 * 1024 + 2 * 2048)
    assert long.first == short.last
    assert long.last == Position(10, 64 + 4 * 8, 8192 + 4 * 2048)
    assert long.sequence_lengths == short.sequence_lengths == (128, 256)
    # both stages see the same data: one sequence for the whole run, whose parts all have an end
    assert long.data == short.data
    assert [stage.tokens for stage in long.data.stages] == [8192, 8192]
    assert long.config.model.rotary_base == 40000.0 and short.config.model.rotary_base == 10000.0
    assert (long.config.layout.cp, short.config.layout.cp) == (2, 1)


def test_a_finished_run_may_get_another_stage_but_not_a_longer_last_one(load, tmp_path: Path) -> None:
    shard = _shard(tmp_path)
    before = stages_of(load(*shard))[-1]
    longer = stages_of(load(*shard, "stages.1.training.steps=6"))[-1]
    further = stages_of(
        load(*shard, text=RUN + "  - {name: more, model: {rotary_base: 40000.0}, training: {steps: 5}}\n")
    )
    # what the checkpoint at the end of the finished run holds, and what it is compared with
    saved = data_of(before)
    assert data_of(further[-1], num_mixes=2) == saved
    # the end of a stage decides which rows come before it
    assert data_of(longer, num_mixes=2) != saved
    rows_of = [
        build_dataset(stage.data, stage.sequence_lengths, 1, "train") for stage in (before, further[-1])
    ]
    for sample in range(before.last.consumed_samples):
        assert rows_of[0].locate(sample) == rows_of[1].locate(sample)
        assert rows_of[0][sample].tokens_S.tobytes() == rows_of[1][sample].tokens_S.tobytes()


def _shard(directory: Path) -> list[str]:
    """A shard of numbered tokens, as overrides of a run file."""
    with ShardWriter(directory / "shard", 70_000) as writer:
        for first in range(0, 60_000, 100):
            writer.add_document(np.arange(first, first + 100))
    return [f"data.sources=[{{prefix: {directory / 'shard'}, max_epochs: 2}}]"]


def test_a_run_without_stages_is_one_stage(load) -> None:
    config = load_run("tiny")
    (stage,) = stages_of(config)
    assert stage.config == config and stage.first == Position() and stage.last.step == config.training.steps


def test_a_resolved_run_file_reads_back(load, tmp_path: Path) -> None:
    from megatron_m1.config import dump_run

    config = load("stages.1.training.steps=3")
    assert config.stages[1].training["steps"] == 3
    (tmp_path / "resolved.yaml").write_text(dump_run(config))
    assert load_run(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.1.model.num_layers=4", "stage 'long' has model.num_layers=4 after 8"),
        ("stages.1.model.rotary_base=5000.0", "rotary_base=5000 after 10000.*keep 10000 or raise it"),
        ("stages.1.training.precision=bf16", "set one precision for all stages"),
        ("stages.1.training.steps=2", "stage 'long' has training.steps=2.*take at least 3 steps"),
        (
            "stages.1.schedule={warmup_steps: 0, warmup_tokens: 8192}",
            "stage 'long' has 8192 tokens and schedule.warmup_tokens=8192.*at most 8191 tokens",
        ),
        ("stages.1.name=short", r"stages are named \['short', 'short'\]"),
        ("stages.1.layout.cp=3", "stage 'long': .*"),
        ("stages.7.training.steps=5", "stages.7 is not there: stages has members 0 to 1"),
        ("data.stages=[{}]", "only one of the two says how the mix changes"),
    ],
)
def test_stages_that_do_not_follow_are_refused(load, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        stages_of(load(override))


def test_an_unknown_key_of_a_stage_is_refused_with_the_nearest_name(load) -> None:
    with pytest.raises(
        ValueError, match=r"unknown key 'stages.1.training.step': did you mean 'stages.1.training.steps'"
    ):
        load(text=RUN.replace("training: {steps: 4", "training: {step: 4"))


POLICY = """
  - name: policy
    kind: rl
    model: {rotary_base: 40000.0}
    layout: {tp: 1, pp: 2, ep: 1}
    training: {steps: 8, sequence_length: 128}
    schedule: {batch_ramp: [{from_tokens: 0, global_batch_tokens: 1024}]}
rl:
  window: {stages_tokens: [64, 128]}
  sources: [{name: sums, kind: synthetic, task: arithmetic}]
"""


def test_a_stage_of_kind_rl_counts_steps_and_leaves_the_data_where_it_is(load) -> None:
    short, long, policy = stages_of(load(text=RUN + POLICY))
    assert policy.kind == "rl" and short.kind == long.kind == "train"
    assert policy.last == Position(18, long.last.consumed_samples, long.last.consumed_tokens)
    # the data is that of the stages that read it, and all of its mixes have begun
    assert policy.data == long.data and policy.sequence_lengths == (128, 256)
    assert (long.num_mixes, policy.num_mixes) == (2, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.1.kind=rl", "only the last of two or more may be of kind 'rl'"),
        ("stages.2.mix={}", "stage 'policy' is of kind 'rl' and has a mix"),
        ("stages.2.rl.sources=[]", "rl.sources is empty: it needs 1 source"),
        ("stages.2.rl.rollout.slots=7", "rl.rollout.slots=7 is not a multiple of layout.pp=2"),
        ("stages.2.rl.window.stages_tokens=[64, 129]", "ends with 129 and training.sequence_length=128"),
        ("stages.2.rl.groups_per_batch=8", "rl.groups_per_batch=8 is less than rl.updates_per_batch=16"),
        ("stages.2.rl.group_size=1", "rl.group_size=1 gives no advantage"),
        ("stages.2.rl.loss.ratio_low=1.5", r"exclude the ratio 1"),
        ("stages.2.rl.loss.kl_coefficient=0.1", "needs a reference model"),
        (
            "stages.2.rl.curriculum.points=[{weights: {sum: 1.0}}]",
            r"names \['sum'\]: the sources are \['sums'\]",
        ),
        ("rl.grup_size=4", "did you mean 'rl.group_size'"),
    ],
)
def test_a_stage_of_kind_rl_that_cannot_be_is_refused(load, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stages_of(load(override, text=RUN + POLICY))
