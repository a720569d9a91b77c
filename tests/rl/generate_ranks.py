"""What the ranks of the generation tests do; every function here runs inside `run_ranks`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_m1.model.config import ModelConfig
from megatron_m1.model.hybrid import build_model
from megatron_m1.rl.generate import GenerationConfig, Generator, Request
from megatron_m1.rl.sample import Prompt, Sample
from parallel.groups import Groups, create_groups, destroy_groups
from parallel.layout import Layout

# weights of this size make distributions that are neither flat nor certain
MODEL = ModelConfig(
    num_layers=4,
    softmax_every=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rotary_dim=8,
    num_experts=4,
    ffn_size=64,
    vocab_size=64,
)
END = 0


@dataclass(frozen=True)
class Answer:
    """A sample, as plain values."""

    key: tuple[int, int]
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish: str | None


def prompts() -> list[Prompt]:
    """Prompts of 1 to 40 tokens."""
    rng = np.random.default_rng(5)
    lengths = [3, 1, 40, 7, 12]
    return [
        Prompt(prompt_id=10 + i, tokens_S=rng.integers(1, 64, length), text="", task="none")
        for i, length in enumerate(lengths)
    ]


def requests(samples: int = 3) -> list[Request]:
    """`samples` of every prompt."""
    return [Request(prompt=prompt, sample_id=i) for prompt in prompts() for i in range(samples)]


def config(**changes: Any) -> GenerationConfig:
    """Short windows, few slots, so that slots are refilled and prompts are read in parts."""
    options = {"window": 64, "end_token": END, "slots": 4, "prefill_tokens": 16, "seed": 3}
    return GenerationConfig(**(options | changes))


def build(groups: Groups, **options: Any) -> list[Any]:
    """The model's chunks, weights scaled up; `options` are those of `build_model`, and `model` is another model."""
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    chunks = build_model(options.pop("model", MODEL), groups, seed=1, **options)
    with torch.no_grad():
        for chunk in chunks:
            for name, weight in chunk.named_parameters():
                if weight.dim() > 1:
                    weight.mul_(6.0 if "output_layer" in name else 2.0)
    return chunks


def generate(chunks: list[Any], groups: Groups, asked: list[Request], **options: Any) -> list[Sample]:
    """Samples of these requests."""
    max_passes = options.pop("max_passes", None)
    generator = Generator(
        chunks, groups, config(**options), version=7, text_of=lambda tokens_S: " ".join(map(str, tokens_S))
    )
    return generator.run(asked, max_passes=max_passes)


def answers(samples: list[Sample]) -> list[Answer]:
    """Comparable values."""
    return [
        Answer(
            (s.prompt_id, s.sample_id),
            tuple(map(int, s.tokens_S)),
            tuple(map(float, s.log_probs_S)),
            s.finish,
        )
        for s in samples
    ]


def in_layouts(layouts: list[Layout]) -> list[list[Answer]]:
    """The same requests in several layouts of one world size."""
    found = []
    for layout in layouts:
        groups = create_groups(layout, torch.device("cpu"))
        # half as many passes as with the slots of the other tests, and slots are still refilled
        found.append(answers(generate(build(groups), groups, requests(), slots=8)))
        destroy_groups()
    return found


def experts_in_layouts(layouts: list[Layout]) -> list[list[Any]]:
    """Recorded experts of the same requests in several layouts of one world size."""
    found = []
    for layout in layouts:
        groups = create_groups(layout, torch.device("cpu"))
        samples = generate(build(groups), groups, requests(), record_experts=True)
        found.append([sample.experts_WLk for sample in samples])
        destroy_groups()
    return found
