"""megatron-core's configuration object, derived from our model, layout and numerics. The only file that names it."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_m1.model.config import ModelConfig, Precision
from parallel.layout import Layout

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(
    model: ModelConfig, layout: Layout, *, precision: Precision = "fp32"
) -> TransformerConfig:
    """What megatron-core's blocks, linear layers, dispatchers and schedules read.

    Losses arrive already divided by the global denominator, so gradients are plain sums everywhere
    (`calculate_per_token_loss` switches megatron-core's own averaging off).
    """
    dtype = DTYPES[precision]
    on_gpu = torch.cuda.is_available()
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_size,
        moe_ffn_hidden_size=model.ffn_size,
        num_moe_experts=model.num_experts,
        moe_router_topk=model.experts_per_token,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        # gloo has no all-to-all that serves expert tensor parallelism; results are the same
        moe_token_dispatcher_type="allgather" if layout.etp > 1 and not on_gpu else "alltoall",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        sequence_parallel=layout.splits_tokens,
        calculate_per_token_loss=True,
        use_cpu_initialization=True,
        # weights are filled by initialize.py, by logical name, so that they do not depend on the layout
        perform_initialization=False,
        # batched point-to-point calls give wrong gradients under interleaving on gloo
        batch_p2p_comm=on_gpu and layout.vpp == 1,
        hetereogenous_dist_checkpoint=True,
        # the default is a deprecated word for the same, and every rank would say so
        cuda_graph_scope=[],
    )
