"""The whole network: megatron-core's GPTModel around our layers, one object per model chunk of this rank."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_m1.model.config import ModelConfig, Precision
from megatron_m1.model.head import Head
from megatron_m1.model.initialize import initialize_weights
from megatron_m1.model.mcore import transformer_config
from megatron_m1.model.memory import LOGITS_MIB, HostCopies, Recompute
from megatron_m1.model.moe import Router
from megatron_m1.model.norm import RMSNorm
from megatron_m1.model.packed import Packed
from megatron_m1.model.residual import PostNormLayer
from parallel.groups import Groups


class HybridModel(GPTModel):
    """Embedding (first chunk), this chunk's decoder layers, final norm and head (last chunk).

    Args:
        config: megatron-core's configuration.
        model: sizes, layer pattern and numerics.
        groups: process groups and layout.
        chunk: index of this model chunk on its pipeline rank.
        recompute: which kinds of layers are computed again in backward.
        offload: keep what the layers save for backward in host memory.
        logits_mib: most fp32 logits that the loss holds at once, in MiB.
    """

    def __init__(
        self,
        config: Any,
        model: ModelConfig,
        groups: Groups,
        chunk: int,
        *,
        recompute: Recompute = "none",
        offload: bool = False,
        logits_mib: int = LOGITS_MIB,
    ) -> None:
        layout, collection = groups.layout, groups.collection
        vp_stage = chunk if layout.vpp > 1 else None
        layer = ModuleSpec(
            module=PostNormLayer, params={"model": model, "layout": layout, "recompute": recompute}
        )
        num_layers = get_num_layers_to_build(config, vp_stage, collection.pp.rank())
        super().__init__(
            config,
            TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm),
            vocab_size=model.vocab_size,
            max_sequence_length=1,
            pre_process=groups.is_first_stage and chunk == 0,
            post_process=groups.is_last_stage and chunk == layout.vpp - 1,
            position_embedding_type="none",
            pg_collection=collection,
            vp_stage=vp_stage,
        )
        self.model = model
        if self.post_process:
            self.output_layer = Head(config, model, collection.tp, logits_mib)
        if offload:
            # megatron-core enters this context around every layer
            self.decoder.offload_context = HostCopies(self.parameters, groups.device)

    def forward(  # type: ignore[override]
        self, tokens_T: torch.Tensor, packed: Packed, labels_T: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One microbatch.

        Args:
            tokens_T: int64 [T] token ids; read on the first chunk only.
            packed: the documents in it.
            labels_T: int64 [T] next tokens; with them the last chunk gives losses instead of logits.

        Returns:
            Hidden states [T or T/tp, 1, D] on all chunks but the last; there, fp32 losses [T] in nats, or logits
            [T, P/tp].
        """
        labels = labels_T[None] if labels_T is not None else None
        out = super().forward(
            tokens_T[None], packed.positions_T[None], None, labels=labels, packed_seq_params=packed
        )
        return out.squeeze(0) if self.post_process else out

    def _postprocess(self, hidden_states: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        """megatron-core's last step, but losses [1, T] come from the head itself, which never holds all logits."""
        labels = named.get("labels")
        if self.post_process and labels is not None:
            return self.output_layer.losses(hidden_states, labels[0])[None]
        return super()._postprocess(hidden_states, *arguments, **named)

    def logical_tensors(self) -> dict[str, Any]:
        """Local parameter name -> megatron-core ShardedTensor: logical name, global shape and this rank's offset.

        The single authority on names: initial weights, checkpoints, conversion and layout tests go through it.
        """
        sharded = self.sharded_state_dict(metadata={"dp_cp_group": self.pg_collection.dp_cp})
        return {name: sharded[name] for name, _ in self.named_parameters()}

    def routers(self) -> list[tuple[int, Router]]:
        """(global layer index, router) of every layer in this chunk."""
        return [(layer.layer_number - 1, layer.moe.router) for layer in self.decoder.layers]


def build_model(
    model: ModelConfig,
    groups: Groups,
    *,
    precision: Precision = "fp32",
    recompute: Recompute = "none",
    offload: bool = False,
    logits_mib: int = LOGITS_MIB,
    seed: int | None = 0,
) -> list[HybridModel]:
    """This rank's model chunks, with initial weights (none for seed=None), on its device.

    Raises:
        ValueError: the layout cannot split this model.
    """
    layout = groups.layout
    layout.check_model(
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        num_experts=model.num_experts,
    )
    for size, name, axis in ((model.vocab_size, "vocab_size", "tp"), (model.ffn_size, "ffn_size", "etp")):
        if size % getattr(layout, axis):
            raise ValueError(
                f"model.{name}={size} is not a multiple of layout.{axis}={getattr(layout, axis)}: it is split over "
                f"{axis}; choose a multiple, or another {axis}"
            )
    config = transformer_config(model, layout, precision=precision)
    chunks = [
        HybridModel(config, model, groups, chunk, recompute=recompute, offload=offload, logits_mib=logits_mib)
        for chunk in range(layout.vpp)
    ]
    for chunk in chunks:
        logical = chunk.logical_tensors()
        if seed is not None:
            initialize_weights(logical, model, seed)
        _mark_split_parameters(chunk, logical)
        chunk.to(groups.device)
    return chunks


def _mark_split_parameters(chunk: HybridModel, logical: dict[str, Any]) -> None:
    """Tell gradient clipping which parameters are a share, not a copy of what tp peers hold.

    megatron-core marks its linear layers only when it initialises them itself.
    """
    for name, parameter in chunk.named_parameters():
        if any(fragments > 1 for fragments in logical[name].axis_fragmentations or ()):
            parameter.tensor_model_parallel = True
