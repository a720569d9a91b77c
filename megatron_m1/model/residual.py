"""One decoder layer: post-norm residuals around attention and experts.

    n = RMSNorm(x);  x' = alpha * n + beta * f(n)      for f = attention, then f = experts
The residual branch carries the NORMALISED activation, so what travels between pipeline stages is the un-normalised
sum. Source: MiniMax-M1 modeling code (postnorm=true); DeepNorm's alpha, MiniMax-01 (arXiv 2501.08313), section 4.2.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset

from megatron_m1.model.config import ModelConfig
from megatron_m1.model.lightning import LightningAttention
from megatron_m1.model.memory import Recompute, is_recomputed
from megatron_m1.model.moe import MixtureOfExperts
from megatron_m1.model.norm import RMSNorm
from megatron_m1.model.packed import Packed
from megatron_m1.model.softmax import SoftmaxAttention
from parallel.layout import Layout


class PostNormLayer(MegatronModule, BaseTransformerLayer):
    """A decoder layer of either kind, built by megatron-core's TransformerBlock from a ModuleSpec.

    Args:
        config: megatron-core's configuration of this stage.
        model: sizes and numerics; `model.layer_kinds` decides the attention.
        layout: how attention works over context-parallel ranks.
        recompute: which kinds of layers keep their input alone and are computed again in backward.
        layer_number: 1-based number within this stage, as TransformerBlock counts.
        pg_collection: megatron-core's process groups.
        vp_stage: model chunk of this pipeline rank, None without interleaving.
    """

    def __init__(
        self,
        config: Any,
        model: ModelConfig,
        layout: Layout,
        recompute: Recompute,
        layer_number: int,
        pg_collection: Any,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number + get_transformer_layer_offset(
            config, vp_stage, pg_collection.pp.rank()
        )
        layer_index = self.layer_number - 1
        kind = model.layer_kinds[layer_index]
        attention = SoftmaxAttention if kind == "softmax" else LightningAttention
        self.is_recomputed = is_recomputed(recompute, kind)
        self.alpha, self.beta = model.alpha, model.residual_beta
        self.attention_norm = RMSNorm(config, model.hidden_size, model.norm_eps)
        self.attention = attention(config, model, layer_index, pg_collection, layout)
        self.moe_norm = RMSNorm(config, model.hidden_size, model.norm_eps)
        self.moe = MixtureOfExperts(config, model, layer_index, pg_collection)

    def forward(
        self, hidden_states: torch.Tensor, packed_seq_params: Packed, **_of_megatron: Any
    ) -> tuple[torch.Tensor, None]:
        """[T or T/tp, 1, D] -> same shape; the None is megatron-core's absent cross-attention context."""
        if self.is_recomputed and self.training:
            layer = functools.partial(self._transform, packed=packed_seq_params)
            return checkpoint(layer, False, hidden_states), None
        return self._transform(hidden_states, packed_seq_params), None

    def _transform(self, hidden: torch.Tensor, packed: Packed) -> torch.Tensor:
        normed = self.attention_norm(hidden)
        hidden = self.alpha * normed + self.beta * self.attention(normed, packed)
        normed = self.moe_norm(hidden)
        return self.alpha * normed + self.beta * self.moe(normed, packed)
