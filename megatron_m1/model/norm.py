"""RMSNorm in its two places: over the hidden channels of a token, and over all heads of a lightning layer.

megatron-core's own wrapper refuses sequence parallelism; ours marks its weight so that its gradient is summed over tp.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim; statistics in fp32.

    Args:
        config: megatron-core's configuration of this stage.
        hidden_size: channels.
        eps: added to the mean square.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        # split tokens give partial weight gradients: megatron-core sums those of marked weights over tp
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise [..., hidden_size], any float dtype; same shape and dtype."""
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class AllHeadsRMSNorm(MegatronModule):
    """RMSNorm over the channels of all heads together, heads split over tp.

    The mean square runs over every rank's heads, so it is all-reduced; normalising each rank's share alone is a
    different (and wrong) function. Source: MiniMax-M1 modeling code, MiniMaxM1LightningAttention.norm.
    """

    def __init__(self, config: Any, channels: int, eps: float, tp_group: dist.ProcessGroup) -> None:
        super().__init__(config)
        self.eps = eps
        self.tp_group = tp_group
        self.channels = channels
        self.weight = nn.Parameter(torch.empty(channels // tp_group.size(), dtype=config.params_dtype))
        # seen by gradient clipping: this rank's share is not a copy of its tp peers'
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim = 0  # type: ignore[attr-defined]
        self.weight.partition_stride = 1  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise this rank's share [T, channels / tp]; same shape and dtype."""
        if self.tp_group.size() == 1:
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        x_fp32 = x.float()
        square = _SumOverRanks.apply(x_fp32.square().sum(-1, keepdim=True), self.tp_group)
        return (x_fp32 * torch.rsqrt(square / self.channels + self.eps)).type_as(x) * self.weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The weight, split over tp on its only axis."""
        return make_sharded_tensors_for_checkpoint(
            {"weight": self.weight},
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose result every rank uses, so the transpose is the same all-reduce of the gradients."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
