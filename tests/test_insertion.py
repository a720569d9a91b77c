"""What a run does about an explosion: which stage is put where, and that half an undoing is finished later."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_m1.config import load_run
from megatron_m1.insertion import (
    JumpFailed,
    intermediate_length,
    plan_answer,
    read_answers,
    undo,
    with_answers,
    write_answers,
)
from megatron_m1.longcontext.jump import Explosion
from megatron_m1.stages import stages_of
from megatron_m1.training.health import Refused, refused_steps, write_refused
from parallel.manifest import Manifest, publish, step_path, write_manifest

RUN = """
preset: tiny
name: jumps
data:
  sources: [{name: a, kind: synthetic, task: copy}, {name: b, kind: synthetic, task: needle}]
  held_out: [{name: c, kind: synthetic, task: needle}]
schedule: {warmup_steps: 2, decay: none, decay_steps: 0, batch_ramp: [{from_tokens: 0, global_batch_tokens: 2048}]}
stages:
  - name: short
    training: {steps: 6, sequence_length: 128}
  - name: long
    mix: {weights: {a: 0.25, b: 0.75}, late_shares: {b: 0.1}}
    model: {rotary_base: 160000.0}
    training: {steps: 32, sequence_length: 512}
    schedule: {peak_learning_rate: 1.0e-3, batch_ramp: [{from_tokens: 0, global_batch_tokens: 4096}]}
"""
EXPLOSION = Explosion(
    step=11, grad_norm=90.0, usual_norm=1.0, steps_in_a_row=3, growth={"softmax 7": float("inf")}
)


@pytest.fixture
def load(tmp_path: Path):
    def load(*overrides: str):
        path = tmp_path / "run.yaml"
        path.write_text(RUN)
        return load_run(path, [f"run_dir={tmp_path / 'run'}", *overrides])

    return load


def plan(config, index=1, num_before=0):
    return plan_answer(config, stages_of(config)[index], EXPLOSION, num_before=num_before)


def test_a_stage_of_the_length_between_comes_before_the_one_that_exploded(load, tmp_path):
    config = load()
    answer = plan(config)
    (tmp_path / "run").mkdir()
    write_answers(tmp_path / "run", [answer])
    assert read_answers(tmp_path / "run") == [answer]
    short, between, long = stages_of(with_answers(config, read_answers(tmp_path / "run")))
    assert (between.name, between.config.training.sequence_length) == ("256 before long", 256)
    assert between.config.model.rotary_base == pytest.approx(40000.0)
    # a quarter of the 32 steps of 4096 tokens; its rates and those of what follows are halved
    assert (between.config.training.steps, between.config.schedule.batch_ramp[0].global_batch_tokens) == (
        8,
        4096,
    )
    assert between.config.schedule.peak_learning_rate == long.config.schedule.peak_learning_rate == 5e-4
    assert between.config.schedule.warmup_steps == 2
    assert (short.last, between.last) == (between.first, long.first)
    assert answer.back_to == short.last.step == 6
    assert long.last.step == 6 + 8 + 32
    # the mix of the stage it prepares, without its late part
    assert between.data.stages[1].weights == {"a": 0.25, "b": 0.75} and not between.data.stages[1].late_shares
    assert long.data.stages[2].late_shares == {"b": 0.1}


def test_answers_follow_each_other(load):
    config = load()
    first = plan(config)
    once = with_answers(config, [first])
    second = plan(once, index=1, num_before=1)
    names = [stage.name for stage in stages_of(with_answers(config, [first, second]))]
    assert names == ["short", "182 before 256 before long", "256 before long", "long"]


def test_a_lower_rate_alone_takes_the_same_stage_again(load):
    config = load("length_jump.answer=lower_rate", "length_jump.rate_factor=0.1")
    answer = plan(config)
    assert answer.inserted is None and answer.back_to == 6
    stages = stages_of(with_answers(config, [answer]))
    assert [stage.name for stage in stages] == ["short", "long"]
    assert stages[1].config.schedule.peak_learning_rate == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("overrides", "num_before", "message"),
    [
        (
            ["length_jump.answer=stop"],
            0,
            "length_jump.answer=stop: lower its learning rate or put a stage before",
        ),
        (["length_jump.most_answers=2"], 2, "2 answers were given already"),
        (
            ["length_jump.answer=lower_rate", "length_jump.rate_factor=1.0"],
            0,
            "no length lies between.*set it below 1",
        ),
    ],
)
def test_a_run_without_an_answer_left_ends_and_says_where_it_exploded(load, overrides, num_before, message):
    with pytest.raises(JumpFailed, match=f"stage 'long': gradients exploded.*softmax 7 x inf.*{message}"):
        plan(load(*overrides), num_before=num_before)


@pytest.mark.parametrize(
    ("shorter", "longer", "multiple", "between"),
    [
        (1024, 4096, 8, 2048),
        (8192, 16384, 64, 11584),
        (8192, 16384, 4096, 12288),
        (64, 128, 64, None),
        (8, 9, 1, None),
    ],
)
def test_the_length_between_is_as_far_from_both_by_ratio(shorter, longer, multiple, between):
    assert intermediate_length(shorter, longer, multiple) == between


def test_answers_of_other_stages_are_refused(load):
    config = load()
    answer = plan(config)
    with pytest.raises(ValueError, match=r"speaks of stage 'long', the run file has \['short', 'other'\]"):
        with_answers(load("stages.1.name=other"), [answer])


def test_undoing_takes_the_newest_first_and_may_be_repeated(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    for step in (4, 6, 8, 9):
        partial = checkpoints / f"step_{step:08d}.partial-x"
        partial.mkdir(parents=True)
        write_manifest(
            partial,
            Manifest(step=step, files=(), tensors_sha256="", layout={}, versions={}, extra={}),
        )
        publish(partial, checkpoints, step)
    for step in (3, 9):
        write_refused(
            tmp_path,
            Refused(step=step, why="nan", loss_nats=1.0, grad_norm=1.0, first_sample=0, num_samples=1),
        )
    for _ in range(2):
        undo(tmp_path, 6)
        assert sorted(path.name for path in checkpoints.iterdir()) == [
            step_path(checkpoints, step).name for step in (4, 6)
        ]
        # their numbers will stand for other samples
        assert [record["step"] for record in refused_steps(tmp_path)] == [3]


def test_the_file_of_answers_holds_no_infinity(load, tmp_path):
    write_answers(tmp_path, [plan(load())])
    assert json.loads((tmp_path / "length_jumps.json").read_text())[0]["growth"] == {"softmax 7": 1e308}
