"""Decay slopes of lightning attention, per head and per layer.

The decay of head h in layer l is exp(-slope(l, h)). Heads and layers are counted over the whole
model: a tensor-parallel or pipeline rank slices the result, it never calls with its own counts.
"""

from __future__ import annotations

import math

import torch


def head_slopes(num_heads: int) -> list[float]:
    """ALiBi slopes: 2^(-8(h+1)/H) for a power of two H, interpolated between two powers otherwise.

    Source: ALiBi (arXiv 2108.12409), as used by MiniMax-M1 (arXiv 2506.13585) and its published code.
    """
    if num_heads < 1:
        raise ValueError(
            f"num_heads={num_heads} gives no slopes: at least one head is allowed; pass the model's head count"
        )
    lower_power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (head + 1) / lower_power) for head in range(lower_power)]
    if lower_power < num_heads:
        doubled = [2.0 ** (-8.0 * (head + 1) / (2 * lower_power)) for head in range(2 * lower_power)]
        slopes += doubled[0::2][: num_heads - lower_power]
    return slopes


def lightning_slopes(num_heads: int, layer_index: int, num_layers: int) -> torch.Tensor:
    """Slopes of one layer: slope(l, h) = head_slope(h) * (1 - l / (L - 1) + 1e-5).

    num_heads: H of the whole model. layer_index: l from 0 over all layers of the model, softmax layers
    counted. num_layers: L of the whole model. Returns fp32 [H] on CPU, computed in float64.

    Raises: ValueError for a layer outside the model. Source: MiniMax-M1's published modelling code; one
    layer alone (L = 1) takes the factor 1 + 1e-5, as vLLM does.
    """
    if not 0 <= layer_index < num_layers:
        raise ValueError(
            f"layer_index={layer_index} is outside a model of {num_layers} layers: 0 to {num_layers - 1} is "
            "allowed; pass the index over all layers of the model, not of this pipeline stage"
        )
    depth = layer_index / (num_layers - 1) if num_layers > 1 else 0.0
    slopes = torch.tensor(head_slopes(num_heads), dtype=torch.float64)
    return (slopes * (1.0 - depth + 1e-5)).to(torch.float32)
