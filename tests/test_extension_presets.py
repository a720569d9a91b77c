"""The presets of MiniMax's own length extensions have the lengths, rotary bases, tokens and mixes of the papers."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from data_pipeline.config import plan_stage
from megatron_m1.cli import app
from megatron_m1.config import load_run
from megatron_m1.stages import stages_of

# MiniMax-01 (arXiv 2501.08313), Table 6: length, rotary base, tokens, percent of short, medium and long documents
TABLE_6 = {
    "128K": (131_072, 5e6, 300e9, (30, 70, 0)),
    "512K": (524_288, 10e6, 32e9, (35, 35, 30)),
    "1M": (1_048_576, 10e6, 26e9, (30, 30, 40)),
}


def test_minimax_01_is_its_table():
    pretraining, *stages = stages_of(load_run("m1-456b-extend-01"))
    base = load_run("m1-456b")
    assert (pretraining.config.training, pretraining.config.schedule) == (base.training, base.schedule)
    assert (pretraining.config.model, pretraining.config.layout) == (base.model, base.layout)
    assert [stage.name for stage in stages] == list(TABLE_6)
    for stage, (length, rotary_base, tokens, percent) in zip(stages, TABLE_6.values(), strict=True):
        config = stage.config
        assert (config.training.sequence_length, config.model.rotary_base) == (length, rotary_base)
        batch_tokens = config.schedule.batch_ramp[0].global_batch_tokens
        assert abs(stage.last.consumed_tokens - stage.first.consumed_tokens - tokens) <= batch_tokens / 2
        mix = stage.data.stages[stage.index]
        assert [100 * mix.weights.get(bucket, 0) for bucket in ("short", "medium", "long")] == list(percent)
        assert (mix.late_shares, mix.late_part) == ({"long questions": 0.1}, 0.2)
        assert mix.transition_tokens > 0


def test_minimax_m1_goes_from_32k_to_1m_in_four_stages():
    stages = stages_of(load_run("m1-456b-extend-m1"))
    assert [stage.config.training.sequence_length for stage in stages] == [
        32_768,
        131_072,
        524_288,
        1_048_576,
    ]
    # MiniMax-Text-01 ends at 10M, and a base never falls
    assert {stage.config.model.rotary_base for stage in stages} == {10e6}


@pytest.mark.parametrize("name", ["m1-456b-extend-01", "m1-456b-extend-m1"])
def test_every_stage_fits_its_ranks_and_its_data(name):
    config = load_run(name)
    stages = stages_of(config)
    assert {stage.config.layout.world_size for stage in stages} == {1024}
    data = stages[-1].data
    buckets = {source.title: source.bucket for source in data.sources}
    assert {title: buckets[title] for title in ("short", "medium", "long")} == {
        title: title for title in ("short", "medium", "long")
    }
    assert (data.medium_from_tokens, data.long_above_tokens) == (32 * 1024, 128 * 1024)
    for stage in stages:
        layout, length = stage.config.layout, stage.config.training.sequence_length
        # at most 64K tokens and two zigzag chunks of whole blocks on a rank
        assert length % (layout.token_shares * data.document_multiple) == 0 and length // layout.cp <= 65_536
        plan_stage(stage.index, data.stages[stage.index], length, data.sources, data.document_multiple)


@pytest.mark.parametrize("name", ["m1-456b-extend-01", "m1-456b-extend-m1"])
def test_the_presets_are_explained(name):
    result = CliRunner().invoke(app, ["train", name, "--explain"])
    assert result.exit_code == 0, result.output
    assert f"preset {name}" in result.output and "1048576" in result.output
