"""The sections `training` and `optimizer` of a run file; apart from the loop and the optimizer that they configure, so
that reading a run file loads no megatron-core.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_m1.model.config import Precision
from megatron_m1.model.memory import LOGITS_MIB, Recompute


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How long, on what rows, and with what numerics."""

    steps: int = 1000
    """Optimizer steps of the run, or of a stage."""
    sequence_length: int = 2048
    """Tokens per row."""
    micro_batch_size: int = 1
    """Rows per microbatch and data-parallel rank."""
    precision: Precision = "bf16"
    """dtype of weights and activations; gradients and optimizer state are fp32 in both."""
    recompute: Recompute = "none"
    """Layers that keep their input alone and are computed again in backward: none, one kind, or all (full)."""
    offload_activations: bool = False
    """Keep what layers save for backward in host memory, copied while other layers compute."""
    logits_mib: int = LOGITS_MIB
    """Most fp32 logits that the loss holds at once, in MiB; more tokens are taken in chunks, computed twice."""
    overlap_communication: bool = False
    """Start reducing a bucket of gradients over dp while backward still runs."""
    evaluate_every_steps: int = 0
    """Steps between evaluations on held-out rows; 0 evaluates at the end only."""
    evaluation_rows: int = 16
    """Held-out rows per evaluation; 0 never evaluates."""
    end_margin_s: float = 60.0
    """Under a time limit: seconds before it that stay free besides what a step and a save were measured to take."""

    def __post_init__(self) -> None:
        for name in ("steps", "sequence_length", "micro_batch_size", "logits_mib"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"training.{name}={getattr(self, name)} is not a count: it must be 1 or more; "
                    "correct it in the run file"
                )
        for name in ("evaluate_every_steps", "evaluation_rows"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"training.{name}={getattr(self, name)} is negative: it must be 0 (off) or more; "
                    "correct it in the run file"
                )
        if not self.end_margin_s >= 0:
            raise ValueError(
                f"training.end_margin_s={self.end_margin_s} is not a time: it must be 0 seconds or more; "
                "correct it in the run file"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW and the gradient clip. The learning rate comes from the schedule, step by step.

    Weight decay is for parameters of two and more dimensions: matrices, embeddings, stacked experts. Norm
    weights and biases do not decay.
    """

    beta1: float = 0.9
    """Decay of the first moment, per step."""
    beta2: float = 0.95
    """Decay of the second moment, per step."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, times the learning rate per step."""
    grad_clip: float = 1.0
    """Largest global gradient norm; longer gradients are scaled down to it. 0 switches clipping off."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(
                    f"optimizer.{name}={getattr(self, name)} is not a decay: it must be in [0, 1); "
                    "usual values are 0.9 for beta1 and 0.95 for beta2"
                )
        if self.epsilon <= 0.0:
            raise ValueError(
                f"optimizer.epsilon={self.epsilon} is not positive: AdamW divides by it where a gradient is always "
                "0; use 1e-8, or 1e-15 for RL"
            )
        for name in ("weight_decay", "grad_clip"):
            if getattr(self, name) < 0.0:
                raise ValueError(
                    f"optimizer.{name}={getattr(self, name)} is negative: it must be 0 or more; "
                    f"set optimizer.{name}=0 to switch it off"
                )
