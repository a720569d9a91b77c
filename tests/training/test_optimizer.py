"""AdamW's settings, the global clip and the norm under tensor and expert parallelism, against whole tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_m1.training.config import OptimizerConfig
from megatron_m1.training.optimizer import build_optimizer
from parallel.layout import Layout
from tests.parallel.checkpoint_ranks import LEARNING_RATE, start, whole_state
from tests.parallel.small_model import logical_parameters, logical_values, set_gradients
from tests.spawn import run_ranks

NAMES = logical_parameters(torch.bfloat16)


def steps_of_two() -> dict[str, Any]:
    """TP2 x EP2: one clipped step, one step without gradients; then what must be refused."""
    trainer = start(Layout(tp=2, ep=2), torch.bfloat16, OptimizerConfig(grad_clip=0.5))
    found: dict[str, Any] = {"at first": whole_state(trainer), "steps at first": trainer.optimizer.num_steps}
    set_gradients(trainer.chunks, 1)
    found["norm"] = trainer.optimizer.step(LEARNING_RATE)
    found["after one"] = whole_state(trainer)
    with torch.no_grad():
        trainer.chunks[0].module.embedding.weight.fill_(0.5)
    trainer.optimizer.take_masters_from_parameters()
    found["other weights"] = whole_state(trainer)
    model = trainer.model_state()
    del model["chunk0"]["embedding.weight"]
    try:
        trainer.optimizer.sharded_state(model)
    except ValueError as error:
        found["without a name"] = str(error)
    expert = next(p for p in trainer.chunks[0].parameters() if not getattr(p, "allreduce", True))
    expert.tensor_model_parallel = False
    try:
        build_optimizer(trainer.chunks, OptimizerConfig(), trainer.groups)
    except AssertionError as error:
        found["uncounted"] = str(error)
    return found


@pytest.fixture(scope="module")
def two() -> dict[str, Any]:
    return run_ranks(2, steps_of_two)[0]


def gradient(name: str) -> torch.Tensor:
    return logical_values(name, NAMES[name].shape, 1)


def whole_norm() -> float:
    return sum(float(gradient(name).double().square().sum()) for name in NAMES) ** 0.5


@pytest.mark.multiprocess
def test_norm_counts_every_element_of_every_whole_tensor_once(two: dict[str, Any]) -> None:
    assert two["norm"] == pytest.approx(whole_norm(), rel=1e-6)


@pytest.mark.multiprocess
def test_clip_scales_all_gradients_to_the_limit(two: dict[str, Any]) -> None:
    moments = {name: two["after one"][f"optimizer.exp_avg.{name}"] / 0.1 for name in NAMES}
    for name, moment in moments.items():
        torch.testing.assert_close(moment, gradient(name) * 0.5 / whole_norm(), rtol=1e-5, atol=1e-8)
    clipped = sum(float(moment.double().square().sum()) for moment in moments.values()) ** 0.5
    assert clipped == pytest.approx(0.5, rel=1e-5)


@pytest.mark.multiprocess
def test_matrices_decay_and_vectors_do_not(two: dict[str, Any]) -> None:
    for name, logical in NAMES.items():
        master = f"optimizer.master.{name}" if logical.dtype == torch.bfloat16 else name
        before, after = two["at first"][master].float(), two["after one"][master].float()
        # the first AdamW step is lr * sign(gradient), up to epsilon over a clipped gradient
        decay = 0.1 if len(logical.shape) >= 2 else 0.0
        slope = gradient(name) * 0.5 / whole_norm()
        expected = before * (1 - LEARNING_RATE * decay) - LEARNING_RATE * slope / (slope.abs() + 1e-8)
        torch.testing.assert_close(after, expected, rtol=0, atol=2e-6)


@pytest.mark.multiprocess
def test_state_exists_before_the_first_step(two: dict[str, Any]) -> None:
    assert two["steps at first"] == 0
    assert int(two["at first"]["optimizer.step"]) == 0
    assert not any(two["at first"][f"optimizer.exp_avg_sq.{name}"].any() for name in NAMES)


@pytest.mark.multiprocess
def test_fp32_parameters_are_their_own_masters(two: dict[str, Any]) -> None:
    masters = {
        key.removeprefix("optimizer.master.")
        for key in two["at first"]
        if key.startswith("optimizer.master.")
    }
    assert masters == {name for name, logical in NAMES.items() if logical.dtype == torch.bfloat16}


@pytest.mark.multiprocess
def test_masters_follow_weights_that_were_loaded_alone(two: dict[str, Any]) -> None:
    masters = two["other weights"]["optimizer.master.embedding.weight"]
    assert torch.equal(masters, torch.full_like(masters, 0.5))
    key = "optimizer.exp_avg.embedding.weight"
    assert torch.equal(two["other weights"][key], two["after one"][key])


@pytest.mark.multiprocess
def test_a_parameter_without_a_name_is_refused(two: dict[str, Any]) -> None:
    assert "shape (16, 16) is not in the model's sharded state" in two["without a name"]


@pytest.mark.multiprocess
def test_an_expert_that_the_norm_would_skip_is_refused(two: dict[str, Any]) -> None:
    assert "tensor_model_parallel" in two["uncounted"]


@pytest.mark.parametrize(
    "wrong", [{"beta1": 1.0}, {"beta2": -0.1}, {"epsilon": 0.0}, {"weight_decay": -1.0}, {"grad_clip": -0.5}]
)
def test_config_refuses_what_makes_no_sense(wrong: dict[str, float]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"optimizer\.{name}={value} .*"):
        OptimizerConfig(**wrong)
