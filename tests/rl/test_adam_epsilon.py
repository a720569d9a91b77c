"""AdamW's epsilon on the gradients of RL: 1e-15 moves what 1e-8 leaves where it is, on the project's own optimizer.

MiniMax-M1 (arXiv 2506.13585, section 3.3): gradients from 1e-18 to 1e-5, most below 1e-14; AdamW (0.9, 0.95, 1e-15).
"""

from __future__ import annotations

import pytest
import torch

from megatron_m1.training.config import OptimizerConfig
from megatron_m1.training.optimizer import build_optimizer
from parallel.groups import Groups
from tests.parallel.small_model import VOCABULARY, WIDTH, build_chunks

LEARNING_RATE, STEPS = 1e-3, 5


def moved(groups: Groups, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of every weight of the embedding, how far five steps with it move the weight, over the rate)."""
    chunks = build_chunks(groups, torch.float32)
    config = OptimizerConfig(beta1=0.9, beta2=0.95, epsilon=epsilon, weight_decay=0.0, grad_clip=1.0)
    optimizer = build_optimizer(chunks, config, groups)
    weight = chunks[0].module.embedding.weight
    with torch.no_grad():
        # near 0, or the rounding of the weight itself would hide the small steps
        weight.zero_()
    gradient = torch.logspace(-18, -5, VOCABULARY * WIDTH).view(VOCABULARY, WIDTH)
    for _ in range(STEPS):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        weight.main_grad.copy_(gradient)
        optimizer.step(LEARNING_RATE)
    return gradient, -weight.detach() / (LEARNING_RATE * STEPS)


@pytest.mark.parametrize("epsilon", [1e-15, 1e-8])
def test_a_constant_gradient_moves_a_weight_by_its_share_of_gradient_plus_epsilon(
    alone: Groups, epsilon: float
) -> None:
    # m and v of a constant gradient are g and g^2 after bias correction
    gradient, steps = moved(alone, epsilon)
    torch.testing.assert_close(steps, gradient / (gradient + epsilon), rtol=1e-4, atol=1e-12)


def test_the_small_epsilon_keeps_alive_what_the_usual_one_freezes(alone: Groups) -> None:
    gradient, small = moved(alone, 1e-15)
    _, usual = moved(alone, 1e-8)
    typical = (gradient > 1e-15) & (gradient < 1e-13)
    assert float(small[typical].min()) > 0.5
    assert float(usual[typical].max()) < 2e-5
    large = gradient > 1e-6
    torch.testing.assert_close(small[large], usual[large], rtol=0.02, atol=0)
