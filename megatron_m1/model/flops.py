"""Parameters and floating-point operations of a model, by formula, and the peak rates of known devices.

Operations are the useful ones of matrix products, 2 per multiply-add: what the equations need, whatever a kernel
does. Causal halves are not counted; recomputed layers are, where asked for. Backward needs twice the forward.
Source: MiniMax-01 (arXiv 2501.08313), section 3.2.2 (blocks of lightning attention); tests count a real forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_m1.model.config import ModelConfig, Precision
from megatron_m1.model.memory import Recompute, is_recomputed

LIGHTNING_BLOCK_TOKENS = 256
"""Tokens whose pairs are multiplied directly, as in training MiniMax-01; other tokens meet through the state."""

_PEAK_FLOPS_PER_S = {
    # dense rates of the vendor's data sheets, bf16 tensor cores; substrings of the device name, first match wins
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H200 NVL": 835.5e12,
    "H200": 989.4e12,
    "H800 PCIe": 756e12,
    "H800": 989.4e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Number of weights by place."""

    embedding: int
    head: int
    lightning: int
    """Attention of all lightning layers, their norm included."""
    softmax: int
    """Attention of all softmax layers."""
    norms: int
    """Block norms and the final norm."""
    routers: int
    experts: int
    """All experts of all layers."""
    experts_per_token: int
    """The experts that one token passes through, in all layers."""

    @property
    def total(self) -> int:
        """Every weight of the model."""
        return self.embedding + self.head + self._outside_experts + self.experts

    @property
    def activated(self) -> int:
        """Weights that one token uses, without embedding and head: MiniMax's way of counting."""
        return self._outside_experts + self.experts_per_token

    @property
    def _outside_experts(self) -> int:
        return self.lightning + self.softmax + self.norms + self.routers


def count_parameters(model: ModelConfig) -> Parameters:
    """Weights of a model, from its sizes alone."""
    width, channels = model.hidden_size, model.num_heads * model.head_dim
    lightning, softmax = (model.layer_kinds.count(kind) for kind in ("lightning", "softmax"))
    expert = 3 * width * model.ffn_size
    return Parameters(
        embedding=model.vocab_size * width,
        head=model.vocab_size * width,
        # query, key, value, gate and output projections, and the norm over all heads
        lightning=lightning * (5 * channels * width + channels),
        softmax=softmax * 2 * width * (channels + model.num_kv_heads * model.head_dim),
        norms=(2 * model.num_layers + 1) * width,
        routers=model.num_layers * model.num_experts * width,
        experts=model.num_layers * model.num_experts * expert,
        experts_per_token=model.num_layers * model.experts_per_token * expert,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """Operations of one forward pass by kind."""

    lightning_projections: int
    """Linear layers of attention, routers and experts (every routed token computed) of all lightning layers."""
    softmax_projections: int
    """The same of all softmax layers."""
    lightning: int
    """The decayed recurrence of all lightning layers."""
    softmax: int
    """Scores and weighted sums of all softmax layers."""
    head: int
    """Logits."""

    @property
    def projections(self) -> int:
        """Linear layers of all decoder layers."""
        return self.lightning_projections + self.softmax_projections

    @property
    def layers(self) -> int:
        """The decoder layers."""
        return self.projections + self.lightning + self.softmax

    @property
    def forward(self) -> int:
        """One forward pass."""
        return self.layers + self.head

    def training(self, recompute: Recompute = "none") -> int:
        """Forward and backward; with recompute also the second forward of those layers."""
        lightning = self.lightning_projections + self.lightning
        softmax = self.softmax_projections + self.softmax
        return (
            3 * self.forward
            + lightning * is_recomputed(recompute, "lightning")
            + softmax * is_recomputed(recompute, "softmax")
        )


def count_flops(
    model: ModelConfig, document_lengths: list[int], *, lightning_block_tokens: int = LIGHTNING_BLOCK_TOKENS
) -> Flops:
    """Operations for documents that do not see each other; padding and dropped tokens count as work.

    Args:
        model: sizes and layer pattern.
        document_lengths: tokens of each document; their sum is the number of tokens.
        lightning_block_tokens: block of the lightning recurrence.
    """
    tokens, parameters = sum(document_lengths), count_parameters(model)
    lightning, softmax = (model.layer_kinds.count(kind) for kind in ("lightning", "softmax"))
    channels = model.num_heads * model.head_dim
    norms_inside_lightning = lightning * channels
    in_every_layer = (parameters.routers + parameters.experts_per_token) // model.num_layers
    near_pairs = sum(_pairs_within_blocks(n, lightning_block_tokens) for n in document_lengths)
    all_pairs = sum(_pairs(n) for n in document_lengths)
    return Flops(
        lightning_projections=2
        * tokens
        * (parameters.lightning - norms_inside_lightning + lightning * in_every_layer),
        softmax_projections=2 * tokens * (parameters.softmax + softmax * in_every_layer),
        # a product for the score and one for the sum per pair; each token updates and reads a K x V state
        lightning=lightning * 4 * channels * (near_pairs + tokens * model.head_dim),
        softmax=softmax * 4 * channels * all_pairs,
        head=2 * tokens * parameters.head,
    )


def flops_per_token(model: ModelConfig, sequence_length: int, *, recompute: Recompute = "none") -> float:
    """Forward and backward operations per token of rows that are one document of `sequence_length` tokens each.

    Packed rows of shorter documents need fewer: `count_flops` takes their lengths.
    """
    return count_flops(model, [sequence_length]).training(recompute) / sequence_length


def peak_flops_per_s(device: torch.device, precision: Precision) -> float | None:
    """Peak rate of one device, None where it is not known (then no utilisation can be stated)."""
    if device.type != "cuda":
        return None
    return peak_of_named_device(torch.cuda.get_device_name(device), precision)


def peak_of_named_device(name: str, precision: Precision) -> float | None:
    """The same by the name that CUDA gives the device.

    Only bf16 rates are listed: our fp32 is true fp32 and is never measured against a peak.
    """
    if precision != "bf16":
        return None
    return next((peak for known, peak in _PEAK_FLOPS_PER_S.items() if known in name), None)


def _pairs(tokens: int) -> int:
    """Pairs (i, j) with j <= i."""
    return tokens * (tokens + 1) // 2


def _pairs_within_blocks(tokens: int, block_tokens: int) -> int:
    blocks, rest = divmod(tokens, block_tokens)
    return blocks * _pairs(block_tokens) + _pairs(rest)
