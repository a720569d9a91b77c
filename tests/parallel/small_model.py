"""A small model with every kind of parameter a checkpoint meets, and gradients that depend on the logical tensor only.

Parameters: real vocab-, column- and row-parallel layers per pipeline stage, a gated projection (two halves in one
weight), replicated ones, an fp32 head and router beside bf16, experts over ep. There is no forward: a gradient is a
slice of a tensor made from the logical name and the step, so any layout must reach the same weights, bit for bit.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import sharded_state_dict_default
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint

from parallel.groups import Groups

VOCABULARY, WIDTH, FFN, EXPERTS, LAYERS = 32, 16, 48, 4, 2


@dataclass(frozen=True)
class Logical:
    """A parameter of the whole model."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def logical_parameters(dtype: torch.dtype) -> dict[str, Logical]:
    """Every parameter of the whole model by its logical name."""
    full = torch.float32
    table = {
        "embedding.weight": Logical((VOCABULARY, WIDTH), dtype),
        "head.weight": Logical((VOCABULARY, WIDTH), full),
    }
    for layer in range(LAYERS):
        table |= {
            f"layers.{layer}.norm.weight": Logical((WIDTH,), dtype),
            f"layers.{layer}.up.weight": Logical((FFN, WIDTH), dtype),
            f"layers.{layer}.down.weight": Logical((WIDTH, FFN), dtype),
            f"layers.{layer}.gated.weight": Logical((2 * FFN, WIDTH), dtype),
            f"layers.{layer}.router.weight": Logical((EXPERTS, WIDTH), full),
            f"layers.{layer}.experts.weight": Logical((EXPERTS, 8, WIDTH), dtype),
        }
    return table


def logical_values(name: str, shape: tuple[int, ...], step: int) -> torch.Tensor:
    """The whole tensor's initial value (step 0) or its gradient in a step; fp32."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}@{step}".encode()))
    return torch.randn(shape, generator=generator) * (0.5 if step == 0 else 0.1)


class _Weight(MegatronModule):
    """One weight, replicated or a part of the experts."""

    def __init__(self, config: TransformerConfig, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))


class _Layer(MegatronModule):
    def __init__(self, config: TransformerConfig, groups: Groups, dtype: torch.dtype) -> None:
        super().__init__(config)
        self.groups = groups
        options = {"config": config, "init_method": torch.nn.init.zeros_, "bias": False}
        self.norm = _Weight(config, (WIDTH,), dtype)
        self.up = ColumnParallelLinear(WIDTH, FFN, **options)
        self.down = RowParallelLinear(FFN, WIDTH, **options, input_is_parallel=True, skip_bias_add=True)
        self.gated = ColumnParallelLinear(WIDTH, 2 * FFN, **options)
        self.router = _Weight(config, (EXPERTS, WIDTH), torch.float32)
        local = EXPERTS // groups.layout.ep
        self.experts = torch.nn.ModuleList(_Weight(config, (8, WIDTH), dtype) for _ in range(local))
        for expert in self.experts:
            expert.weight.allreduce = False
            expert.weight.tensor_model_parallel = True

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        place = self.groups.coordinates
        metadata = {"dp_cp_group": self.groups.collection.dp_cp}
        state = {}
        for name in ("up", "down", "gated"):
            state |= getattr(self, name).sharded_state_dict(f"{prefix}{name}.", (), metadata)
        gated = f"{prefix}gated.weight"
        state[gated] = apply_swiglu_sharded_factory(state[gated], ())
        for name in ("norm", "router"):
            key = f"{prefix}{name}.weight"
            state[key] = make_sharded_tensor_for_checkpoint(getattr(self, name).weight, key)
        for index, expert in enumerate(self.experts):
            number = place["ep"] * len(self.experts) + index
            sharded = make_sharded_tensor_for_checkpoint(
                expert.weight, f"{prefix}experts.weight", prepend_offsets=((0, number, EXPERTS),)
            )
            sharded.replica_id = (0, 0, place["edp"])
            state[f"{prefix}experts.{index}.weight"] = sharded
        return state


class SmallModel(MegatronModule):
    """This pipeline rank's part of the model."""

    def __init__(self, config: TransformerConfig, groups: Groups, dtype: torch.dtype) -> None:
        super().__init__(config)
        self.groups = groups
        per_stage = LAYERS // groups.layout.pp
        first = groups.coordinates["pp"] * per_stage
        self.layers = torch.nn.ModuleDict(
            {str(first + index): _Layer(config, groups, dtype) for index in range(per_stage)}
        )
        if groups.is_first_stage:
            self.embedding = VocabParallelEmbedding(
                VOCABULARY, WIDTH, init_method=torch.nn.init.zeros_, config=config
            )
        if groups.is_last_stage:
            self.head = _Weight(config, (VOCABULARY // groups.layout.tp, WIDTH), torch.float32)
            self.head.weight.tensor_model_parallel = True

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        metadata = {"dp_cp_group": self.groups.collection.dp_cp}
        state = {}
        for name, layer in self.layers.items():
            state |= layer.sharded_state_dict(f"{prefix}layers.{name}.", (), metadata)
        if self.groups.is_first_stage:
            state |= sharded_state_dict_default(self.embedding, f"{prefix}embedding.", (), metadata)
        if self.groups.is_last_stage:
            key = f"{prefix}head.weight"
            state[key] = make_tp_sharded_tensor_for_checkpoint(self.head.weight, key, 0)
        return state


def build_chunks(groups: Groups, dtype: torch.dtype) -> list[DistributedDataParallel]:
    """The model of this rank with its initial weights, wrapped as the trainer wraps it."""
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=4,
        use_cpu_initialization=not torch.cuda.is_available(),
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=groups.layout.tp,
        pipeline_model_parallel_size=groups.layout.pp,
        pipeline_dtype=dtype,
        expert_model_parallel_size=groups.layout.ep,
        expert_tensor_parallel_size=1,
        num_moe_experts=EXPERTS,
        sequence_parallel=groups.layout.tp > 1,
        calculate_per_token_loss=True,
    )
    model = SmallModel(config, groups, dtype).to(groups.device)
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=False, bucket_size=1000
    )
    chunk = DistributedDataParallel(config, ddp, model)
    _fill(chunk, 0, gradients=False)
    return [chunk]


def set_gradients(chunks: list[DistributedDataParallel], step: int) -> None:
    """Give every parameter the slice of its logical gradient of `step`, as if it had been reduced already."""
    for chunk in chunks:
        _fill(chunk, step, gradients=True)


def whole_name(name: str) -> str:
    """Logical name of a parameter of this rank; the experts are one tensor."""
    parts = name.removeprefix("module.").split(".")
    return ".".join([*parts[:3], "weight"]) if "experts" in parts else ".".join(parts)


@torch.no_grad()
def _fill(chunk: DistributedDataParallel, step: int, *, gradients: bool) -> None:
    groups = chunk.module.groups
    for name, parameter in chunk.named_parameters():
        logical = whole_name(name)
        whole = logical_values(logical, logical_parameters(parameter.dtype)[logical].shape, step)
        target = parameter.main_grad if gradients else parameter
        target.copy_(_slice_for(name, whole, parameter.shape, groups))


def _slice_for(name: str, whole: torch.Tensor, shape: torch.Size, groups: Groups) -> torch.Tensor:
    place, tp = groups.coordinates, groups.layout.tp
    parts = name.split(".")
    if "experts" in parts:
        return whole[place["ep"] * (EXPERTS // groups.layout.ep) + int(parts[-2])]
    if whole.shape == shape:
        return whole
    if "gated" in parts:
        return torch.cat([half.chunk(tp)[place["tp"]] for half in whole.chunk(2)])
    dim = next(dim for dim, (a, b) in enumerate(zip(whole.shape, shape, strict=True)) if a != b)
    return whole.chunk(tp, dim)[place["tp"]]
