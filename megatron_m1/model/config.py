"""What the model is: sizes, layer pattern and numerics of a MiniMax-M1-type network. Nothing about where it runs.

Source: MiniMax-M1 (arXiv 2506.13585), MiniMax-01 (arXiv 2501.08313), and the released config.json of MiniMax-M1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from parallel.layout import divisors

LayerKind = Literal["lightning", "softmax"]
Precision = Literal["fp32", "bf16"]
"""Of weights and activations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and numerics. The defaults outside the sizes are MiniMax-M1's."""

    num_layers: int = 8
    """Decoder layers; each is attention followed by a mixture of experts."""
    softmax_every: int = 8
    """Every this-many-th layer is softmax attention, all others are lightning attention."""
    hidden_size: int = 128
    """Channels of the residual stream."""
    num_heads: int = 4
    """Query heads of both kinds of attention."""
    num_kv_heads: int = 2
    """Key/value heads of the softmax layers (grouped-query attention)."""
    head_dim: int = 32
    """Channels per head; num_heads * head_dim need not equal hidden_size."""
    rotary_dim: int = 16
    """Leading channels of each softmax head that are rotated; the rest pass through."""
    rotary_base: float = 10_000.0
    """Base of the rotary frequencies: 10,000 in base pretraining, 5e6 to 1e7 after context extension."""
    num_experts: int = 4
    """Experts per layer."""
    experts_per_token: int = 2
    """Experts that process each token (top-k)."""
    ffn_size: int = 256
    """Hidden channels of one expert."""
    vocab_size: int = 4096
    """Rows of the embedding and of the head."""
    norm_eps: float = 1e-5
    """Epsilon of the block RMSNorms."""
    lightning_norm_eps: float = 1e-6
    """Epsilon of the RMSNorm over all heads of a lightning layer."""
    residual_alpha: float | None = None
    """Weight of the normalised residual branch; None is DeepNorm's (2 * num_layers)^0.25."""
    residual_beta: float = 1.0
    """Weight of the sub-layer's output in the residual sum."""
    router_fp32: bool = True
    """Compute router logits in fp32 from fp32 weights."""
    auxiliary_coefficient: float = 0.01
    """Weight of the load-balancing loss; 0 switches it off."""
    auxiliary_form: Literal["minimax01", "huggingface"] = "minimax01"
    """Normalisation of the load-balancing loss; the coefficients of the two are not portable."""
    capacity_factor: float | None = None
    """None routes every token (dropless); c keeps per row and expert at most c * k * tokens / experts of them."""
    experts: Literal["m1", "megatron"] = "m1"
    """Who computes the experts: our grouped operator, or megatron-core's SequentialMLP to compare with it. Weights and
    checkpoints are the same, so it may change at any resume."""
    head_fp32: bool = True
    """Keep the head's weight and compute its logits and gradients in true fp32 (M1, section 3.2)."""

    def __post_init__(self) -> None:
        sizes = (
            "num_layers",
            "softmax_every",
            "hidden_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "num_experts",
            "experts_per_token",
            "ffn_size",
            "vocab_size",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(
                    f"model.{name}={getattr(self, name)} is not a size: it must be 1 or more; "
                    "correct it in the run file"
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads}: "
                f"choose num_kv_heads from {divisors(self.num_heads)}"
            )
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"model.rotary_dim={self.rotary_dim} with model.head_dim={self.head_dim}: channels are rotated in "
                f"pairs, so it must be even and at most {self.head_dim}; MiniMax uses head_dim / 2"
            )
        if self.experts_per_token == 1:
            raise ValueError(
                "model.experts_per_token=1: the weight of a single expert would be a softmax over one number, always "
                f"1, and the router would not learn; choose from 2 to {self.num_experts}"
            )
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"model.experts_per_token={self.experts_per_token} is more than model.num_experts={self.num_experts}: "
                f"choose experts_per_token from 2 to {self.num_experts}"
            )
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(
                f"model.capacity_factor={self.capacity_factor} would drop every token: it must be positive, 1.0 keeps "
                "an even load; set it to null for dropless routing"
            )

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Kind of every layer, by global index."""
        return tuple(
            "softmax" if (layer + 1) % self.softmax_every == 0 else "lightning"
            for layer in range(self.num_layers)
        )

    @property
    def alpha(self) -> float:
        """Weight of the normalised residual branch: DeepNorm's (2N)^0.25 unless given (MiniMax-01, section 4.2)."""
        return (2 * self.num_layers) ** 0.25 if self.residual_alpha is None else self.residual_alpha

    @property
    def initial_gain(self) -> float:
        """DeepNorm's gain (8N)^-0.25 on values, outputs and experts at initialisation (MiniMax-01, section 4.2)."""
        return (8 * self.num_layers) ** -0.25
