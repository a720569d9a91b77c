"""The lightning attention layer: one projection, SiLU, the decayed recurrence, a norm over all heads, a sigmoid gate.

    q, k, v = silu(W_qkv n),  KV_t = lambda KV_{t-1} + k_t^T v_t,  o_t = q_t KV_t
    out = W_o (sigmoid(W_g n) * RMSNorm_all_heads(o))
Source: MiniMax-01 (arXiv 2501.08313), section 2.2; MiniMax-M1 modeling code. No rotary, no 1/sqrt(d), no denominator.
Legend: T packed tokens, h this rank's heads, K head channels, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule

from kernels_cuda.lightning.decay import lightning_slopes
from kernels_cuda.lightning.projection import lightning_of_projection
from megatron_m1.model.config import ModelConfig
from megatron_m1.model.extend import extend_lightning
from megatron_m1.model.norm import AllHeadsRMSNorm
from megatron_m1.model.packed import Packed
from megatron_m1.model.prefill import prefill_lightning
from parallel.lasp import ContextShare, horizon_of, lightning_attention_over_ranks
from parallel.layout import Layout
from parallel.state_exchange import exchange_of


class LightningAttention(MegatronModule):
    """Lightning attention of one layer, heads split over tp.

    The query, key, value and gate rows of a head lie together in one weight, [q | k | v | gate] per head, so that one
    matmul (and under sequence parallelism one all-gather) serves all four and tp splits it at head borders.

    Args:
        config: megatron-core's configuration of this stage.
        model: sizes and numerics.
        layer_index: GLOBAL layer index from 0; the decay depends on it, whatever the pipeline stage.
        groups: megatron-core's process groups.
        layout: how context-parallel ranks exchange their states.
    """

    def __init__(
        self, config: Any, model: ModelConfig, layer_index: int, groups: Any, layout: Layout
    ) -> None:
        super().__init__(config)
        self.layer_index = layer_index
        self.head_dim = model.head_dim
        self.heads = model.num_heads // groups.tp.size()
        channels = model.num_heads * model.head_dim
        options = {"config": config, "init_method": None, "bias": False, "tp_group": groups.tp}
        self.linear_qkvg = ColumnParallelLinear(
            model.hidden_size, 4 * channels, gather_output=False, skip_bias_add=True, **options
        )
        self.norm = AllHeadsRMSNorm(config, channels, model.lightning_norm_eps, groups.tp)
        self.linear_out = RowParallelLinear(
            channels, model.hidden_size, input_is_parallel=True, skip_bias_add=True, **options
        )
        slopes_H = lightning_slopes(model.num_heads, layer_index, model.num_layers)
        first = groups.tp.rank() * self.heads
        # a constant of the architecture: recomputed, never saved, never cast below fp32
        self.slopes_h = slopes_H[first : first + self.heads].float()
        self.exchange, self.cp_group = exchange_of(layout, groups), groups.cp
        self.horizon_tokens = horizon_of(self.slopes_h, layout.cp_decay_floor)

    def forward(self, x_SBD: torch.Tensor, packed: Packed) -> torch.Tensor:
        """[T or T/tp, 1, D] -> same shape; documents of `packed` do not see each other."""
        qkvg, _ = self.linear_qkvg(x_SBD)
        tokens = qkvg.shape[0]
        qkvg_ThcK = qkvg.view(tokens, self.heads, 4, self.head_dim)
        qkv_Th3K = torch.nn.functional.silu(qkvg_ThcK[:, :, :3])
        self.slopes_h = self.slopes_h.to(qkv_Th3K.device)
        o_ThK = self._attend(qkv_Th3K, packed)
        y = self.norm(o_ThK.reshape(tokens, -1))
        gate = torch.sigmoid(qkvg_ThcK[:, :, 3]).reshape(tokens, -1)
        out, _ = self.linear_out((gate * y).view(tokens, 1, -1))
        return out

    def _attend(self, qkv_Th3K: torch.Tensor, packed: Packed) -> torch.Tensor:
        """The recurrence of this rank's heads over whole documents, wherever their tokens are."""
        slopes, extension = self.slopes_h, packed.extension
        if packed.split.num_ranks == 1 and extension is None:
            return lightning_of_projection(qkv_Th3K, slopes, packed.cu_seqlens)
        q, k, v = qkv_Th3K.unbind(2)
        if packed.split.num_ranks == 1:
            return extend_lightning(q, k, v, slopes, self.layer_index, packed)
        share = ContextShare(split=packed.split, exchange=self.exchange, horizon_tokens=self.horizon_tokens)
        if extension is not None:
            return prefill_lightning(q, k, v, slopes, self.layer_index, packed, share, self.cp_group)
        return lightning_attention_over_ranks(q, k, v, slopes, share)
