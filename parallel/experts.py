"""The experts of one rank, called by megatron-core's token dispatchers with tokens already sorted by expert.

Weights of all local experts lie in two tensors, so that a grouped GEMM reads them in place. Under expert tensor
parallelism each rank holds a share of every expert's hidden channels and the dispatcher sums the partial outputs.
Legend: R routed rows, e this rank's experts, D width, f this rank's share of the hidden channels F.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.module import MegatronModule
from torch import nn

from kernels_cuda.moe.op import grouped_mlp


class GroupedExperts(MegatronModule):
    """SwiGLU experts: y = w * W_down (silu(W_gate x) * W_up x).

    Args:
        num_local_experts: experts on this rank.
        config: megatron-core's configuration of this stage.
        pg_collection: megatron-core's process groups (ep, expt_tp, expt_dp).
    Source: MiniMax-01 (arXiv 2501.08313), section 2.1.
    """

    def __init__(self, num_local_experts: int, config: Any, pg_collection: Any) -> None:
        super().__init__(config)
        self.groups = pg_collection
        hidden = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        shapes = {
            "gate_up": (num_local_experts, 2, hidden, config.hidden_size),
            "down": (num_local_experts, config.hidden_size, hidden),
        }
        for name, shape in shapes.items():
            weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
            # reduced over the ranks that hold the same experts, not over plain data parallelism
            weight.allreduce = False  # type: ignore[attr-defined]
            # no tp peer holds a copy: gradient clipping must count every rank's share
            weight.tensor_model_parallel = True  # type: ignore[attr-defined]
            self.register_parameter(name, weight)

    def forward(
        self, x_RD: torch.Tensor, rows_per_expert: torch.Tensor, weights_R: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Rows sorted by expert -> weighted outputs [R, D]; the None is megatron-core's absent bias."""
        rows_per_expert = torch.as_tensor(rows_per_expert)
        y_RD = grouped_mlp(x_RD, self.gate_up, self.down, rows_per_expert, weights_R)
        return y_RD, None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Both tensors, split over ep on the expert axis and over etp on the hidden axis."""
        ep, etp = self.groups.ep, self.groups.expt_tp
        hidden_axis = {"gate_up": 2, "down": 2}
        # the tensors are the same on every rank of the expert-data-parallel group
        replica = (0, 0, self.groups.expt_dp.rank())
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                getattr(self, name),
                (0, ep.rank(), ep.size()),
                (axis, etp.rank(), etp.size()),
                replica_id=replica,
            )
            for name, axis in hidden_axis.items()
        }
