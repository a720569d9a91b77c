"""Initial weights: Xavier with DeepNorm's gain, drawn by logical tensor name, so every layout starts alike.

A tensor is drawn in blocks along its first axis, each from its own generator keyed by (seed, name, block); a rank
draws only the blocks it holds a part of. Source: MiniMax-01 (arXiv 2501.08313), section 4.2; which matrices take
the gain is DeepNorm's rule (values, outputs, feed-forward), the paper does not say.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from megatron_m1.model.config import ModelConfig

_ROWS_PER_BLOCK = 1024


@torch.no_grad()
def initialize_weights(logical: dict[str, Any], model: ModelConfig, seed: int) -> None:
    """Fill every parameter of a model chunk.

    Args:
        logical: local name -> megatron-core ShardedTensor over the parameter (key, global shape, offset).
        model: sizes, which set fan-in, fan-out and gain.
        seed: of the run.
    """
    for tensor in logical.values():
        scales = _row_scales(tensor.key, tuple(tensor.global_shape), model)
        if scales is None:
            tensor.data.fill_(1.0)
            continue
        rows_per_block = _ROWS_PER_BLOCK if len(tensor.global_shape) == 2 else 1
        _draw(tensor, scales, rows_per_block, seed)


def _draw(tensor: Any, scales: torch.Tensor, rows_per_block: int, seed: int) -> None:
    """Draw this rank's part of one logical tensor: normal numbers times the scale of their row."""
    offsets, shape = tensor.global_offset, tensor.local_shape
    inner = tuple(slice(o, o + n) for o, n in zip(offsets[1:], shape[1:], strict=True))
    first, last = offsets[0], offsets[0] + shape[0]
    for start in range(first // rows_per_block * rows_per_block, last, rows_per_block):
        stop = min(start + rows_per_block, tensor.global_shape[0])
        digest = hashlib.sha256(f"{seed}/{tensor.key}/{start}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        block = torch.randn((stop - start, *tensor.global_shape[1:]), generator=generator)
        block *= scales[start:stop].view(-1, *[1] * (block.ndim - 1))
        low, high = max(start, first), min(stop, last)
        tensor.data[low - first : high - first].copy_(block[(slice(low - start, high - start), *inner)])


def _row_scales(key: str, shape: tuple[int, ...], model: ModelConfig) -> torch.Tensor | None:
    """Standard deviation of each index of the first axis; None for the weights of norms, which start at 1."""
    width, gain = model.hidden_size, model.initial_gain
    channels = model.num_heads * model.head_dim
    kv_channels = model.num_kv_heads * model.head_dim

    def xavier(fan_in: int, fan_out: int, scale: float = 1.0) -> float:
        return float(scale * (2 / (fan_in + fan_out)) ** 0.5)

    if "norm" in key.split(".")[-2]:
        return None
    if key.endswith("linear_qkvg.weight"):
        plain, value = xavier(width, channels), xavier(width, channels, gain)
        return _repeat_rows([plain, plain, value, plain], model.head_dim, model.num_heads)
    if key.endswith("linear_qkv.weight"):
        queries = [xavier(width, channels)] * (model.num_heads // model.num_kv_heads)
        group = [*queries, xavier(width, kv_channels), xavier(width, kv_channels, gain)]
        return _repeat_rows(group, model.head_dim, model.num_kv_heads)
    if key.endswith("linear_out.weight"):
        return torch.full((shape[0],), xavier(channels, width, gain))
    if key.endswith(("experts.gate_up", "experts.down")):
        return torch.full((shape[0],), xavier(width, model.ffn_size, gain))
    if key.endswith(("router.weight", "output_layer.weight", "word_embeddings.weight")):
        return torch.full((shape[0],), xavier(shape[1], shape[0]))
    raise AssertionError(f"no initialisation rule for {key} of shape {shape}")


def _repeat_rows(pattern: list[float], rows_each: int, times: int) -> torch.Tensor:
    return torch.tensor(pattern).repeat_interleave(rows_each).repeat(times)
