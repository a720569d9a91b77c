"""One run file, typed: layers in order, unknown keys and wrong types refused, cross-checks complete, dump
exact.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_m1 import config as run_file
from megatron_m1.config import dump_run, explain, load_run, preset_names

PRESETS = [
    "life-tiny",
    "long-tiny",
    "m1-456b",
    "m1-456b-extend-01",
    "m1-456b-extend-m1",
    "m1-456b-rl-m1",
    "m1-456b-sft-01",
    "rl-tiny",
    "sft-tiny",
    "small",
    "tiny",
]


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refusal(name_or_path, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_run(name_or_path, overrides)
    assert type(caught.value) is ValueError
    return str(caught.value)


def test_the_presets_are_those_of_the_readme():
    assert preset_names() == PRESETS
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in readme for name in preset_names())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_legal_and_carries_its_name(name):
    config = load_run(name)
    assert config.name == name
    assert config.run_dir == Path("runs") / name


def test_the_demo_is_tensor_pipeline_and_expert_parallel_on_four_ranks():
    config = load_run("tiny")
    layout = config.layout
    assert (layout.tp, layout.pp, layout.ep, layout.etp, layout.world_size) == (2, 2, 2, 1, 4)
    assert config.model.layer_kinds == ("lightning",) * 7 + ("softmax",)
    assert (config.model.num_experts, config.model.experts_per_token) == (4, 2)
    assert config.model.vocab_size == 4096


def matrix_parameters(model) -> tuple[int, int]:
    """All and activated parameters by the arithmetic of the released checkpoint's tensor shapes.

    Activated leaves out the embedding and the head, as the published 45.9B does.
    """
    inner, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    width = model.hidden_size
    softmax_layers = model.num_layers // model.softmax_every
    lightning = 5 * inner * width + inner
    softmax = 2 * inner * width + 2 * kv * width
    expert = 3 * width * model.ffn_size
    around = model.num_experts * width + 2 * width
    attention = (model.num_layers - softmax_layers) * lightning + softmax_layers * softmax
    shared = attention + model.num_layers * around + width
    total = shared + model.num_layers * model.num_experts * expert + 2 * model.vocab_size * width
    return total, shared + model.num_layers * model.experts_per_token * expert


def test_the_published_model_has_the_published_number_of_parameters():
    assert matrix_parameters(load_run("m1-456b").model) == (456_089_655_296, 45_944_920_064)


@pytest.mark.parametrize(("name", "least", "most"), [("tiny", 5e6, 10e6), ("small", 0.9e9, 1.1e9)])
def test_the_small_presets_have_the_size_they_say(name, least, most):
    assert least <= matrix_parameters(load_run(name).model)[0] <= most


def test_values_come_from_default_preset_file_and_override_in_that_order(tmp_path):
    path = write(tmp_path, "preset: tiny\nname: mine\ntraining: {steps: 7}\nlayout: {pp: 4}\n")
    config = load_run(path, ["training.steps=9", "layout.ep=1"])
    assert config.name == "mine"
    assert config.run_dir == Path("runs/mine")
    assert config.training.steps == 9
    assert (config.layout.tp, config.layout.pp, config.layout.ep) == (2, 4, 1)
    assert config.optimizer.beta2 == 0.95


def test_explain_names_the_origin_of_every_value(tmp_path):
    path = write(tmp_path, "preset: tiny\nname: mine\ntracking: {tags: {team: a}}\n")
    origins = {item.path: (item.value, item.origin) for item in explain(path, ["training.steps=9"])}
    assert origins["name"] == ("mine", f"file {path}")
    assert origins["layout.tp"] == (2, "preset tiny")
    assert origins["training.steps"] == (9, "override")
    assert origins["optimizer.beta2"] == (0.95, "default")
    assert origins["run_dir"] == ("runs/mine", "default")
    assert origins["tracking.tags.team"] == ("a", f"file {path}")
    assert set(origins) >= {"seed", "model.num_layers", "schedule.batch_ramp", "data.sources"}


def test_a_preset_may_build_on_another_and_a_circle_is_refused(tmp_path):
    base = write(tmp_path, "preset: tiny\nname: base\nseed: 5\n", "base.yaml")
    top = write(tmp_path, f"preset: {base}\nname: top\n", "top.yaml")
    assert (load_run(top).name, load_run(top).seed, load_run(top).layout.tp) == ("top", 5, 2)
    write(tmp_path, f"preset: {top}\n", "base.yaml")
    assert "builds on itself" in refusal(top)


def test_a_file_that_was_cut_to_nothing_is_not_a_run_of_defaults(tmp_path):
    assert "holds nothing: a run file has at least one" in refusal(write(tmp_path, ""))


def test_the_resolved_file_reads_back_to_the_same_run(tmp_path):
    for name in preset_names():
        config = load_run(name, ["tracking.tags={a: on, b: '1e5'}", "seed=7"])
        path = write(tmp_path, dump_run(config))
        assert load_run(path) == config
        assert dump_run(load_run(path)) == dump_run(config)


def test_every_value_stands_in_the_resolved_file(tmp_path):
    path = write(tmp_path, dump_run(load_run("tiny")))
    assert {item.origin for item in explain(path)} == {f"file {path}"}


def test_an_unknown_key_is_refused_with_the_nearest_name_and_its_path(tmp_path):
    message = refusal(write(tmp_path, "preset: tiny\nschedule: {warmup_step: 3}\n"))
    assert "unknown key 'schedule.warmup_step'" in message
    assert "did you mean 'schedule.warmup_steps'" in message
    assert "run.yaml" in message
    assert "did you mean 'layout'" in refusal("tiny", "layot.tp=1")
    assert "'data.sources.0.wieght': did you mean 'data.sources.0.weight'" in refusal(
        "tiny", "data.sources=[{prefix: a, wieght: 2}]"
    )


def test_an_unknown_run_is_refused_with_the_presets():
    message = refusal("tiiny")
    assert "did you mean 'tiny'" in message
    assert ", ".join(PRESETS) in message


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("layout.tp=two", "layout.tp"),
        ("layout.tp='2'", "layout.tp"),
        ("layout.tp=1.5", "layout.tp"),
        ("layout.tp=true", "layout.tp"),
        ("layout.tp=null", "layout.tp"),
        ("layout.sequence_parallel=off", "layout.sequence_parallel"),
        ("model.rotary_base=fast", "model.rotary_base"),
        ("training.steps=[1]", "training.steps"),
        ("schedule.decay=sine", "schedule.decay"),
        ("name=a/b", "name"),
        ("seed=-1", "seed"),
        ("data.sources=[{prefix: 3}]", "data.sources.0.prefix"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_its_path_and_value(override, path):
    message = refusal("tiny", override)
    assert message.startswith(f"{path}=") or f"\n{path}=" in message
    assert "is not legal" in message


def test_a_sections_own_rule_speaks_in_its_own_words():
    assert "layout.tp=0 is not a size" in refusal("tiny", "layout.tp=0")


def test_a_section_that_is_a_value_is_refused():
    assert "it is a section" in refusal("tiny", "layout=4")


def batch(tokens: int) -> str:
    return f"schedule.batch_ramp=[{{from_tokens: 0, global_batch_tokens: {tokens}}}]"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("layout.pp=3", ["3", "8 layers", "choose", "[1, 2, 4, 8]"]),
        ("layout.tp=8 layout.ep=4", ["layout.tp=8", "4 attention heads", "[1, 2, 4]"]),
        ("layout.ep=8 layout.dp=4", ["layout.ep=8", "4 experts"]),
        ("model.vocab_size=4097", ["layout.tp=2", "model.vocab_size=4097", "multiple of 2"]),
        ("layout.etp=7 layout.dp=7", ["layout.etp=7", "model.ffn_size=288", "choose etp from"]),
        (batch(1000), ["1000 tokens", "multiple of 1024"]),
        ("layout.dp=3", ["schedule.batch_ramp", "2048 tokens", "micro_batch_size * dp"]),
        ("layout.vpp=2 training.micro_batch_size=8", ["1 microbatches", "layout.vpp=2", "multiple of"]),
        (
            f"training.sequence_length=255 training.micro_batch_size=1 {batch(255)}",
            ["sequence_length=255", "cp*tp=2"],
        ),
    ],
)
def test_a_broken_rule_between_sections_says_what_would_be_legal(overrides, words):
    message = refusal("tiny", *re.split(r" (?=[a-z]+\.)", overrides))
    missing = [word for word in words if word not in message]
    assert not missing, message


def test_a_run_is_immutable_and_no_key_can_be_added():
    config = load_run("tiny")
    with pytest.raises(ValueError):
        config.seed = 3
    with pytest.raises(ValueError):
        run_file.RunConfig(no_such_section=1)


def test_no_section_shares_a_field_object_between_runs():
    assert load_run("tiny") == load_run("tiny")
    assert load_run("tiny", ["seed=2"]).model_dump() != load_run("tiny").model_dump()


def test_every_field_of_every_section_is_documented_and_has_a_default():
    import ast
    import dataclasses
    import inspect

    for field in run_file.RunConfig.model_fields.values():
        section = field.annotation
        if not dataclasses.is_dataclass(section):
            continue
        body = ast.parse(inspect.getsource(section)).body[0].body
        following = dict(zip(body, [*body[1:], None], strict=True))
        for statement, after in following.items():
            if isinstance(statement, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{section.__name__}.{ast.unparse(statement.target)} has no docstring line"
        section()
