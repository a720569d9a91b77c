"""AdamW over megatron-core's DistributedOptimizer, and its state under logical names.

State of a parameter `K` of the model is stored as `optimizer.master.K` (16-bit parameters only: for fp32 ones
the parameter is its own master), `optimizer.exp_avg.K` and `optimizer.exp_avg_sq.K`, with the key, global
shape and offset of the parameter itself, plus one `optimizer.step`. No bucket, range or rank is in it, so
every layout loads every checkpoint exactly. DistributedOptimizer's own state_dict is not used: with torch's
AdamW it asserts before the first step, shares one step tensor between all parameters on load, and cannot
change EP; and its `_get_main_param_and_optimizer_states` mixes up parameters when one group has 16-bit and
fp32 ones, as ours do. Source: AdamW settings of MiniMax-01 (arXiv 2501.08313), section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import clip_grads, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

from megatron_m1.training.config import OptimizerConfig
from parallel.groups import Groups
from parallel.ownership import CutTensor, Exchange, assign_owners, ranges_of

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"


def build_optimizer(
    chunks: Sequence[DistributedDataParallel], config: OptimizerConfig, groups: Groups
) -> Optimizer:
    """The optimizer of this rank's model chunks, its state allocated and zero. Collective.

    chunks: DistributedDataParallel with `use_distributed_optimizer`; parameters in bf16 or fp32, mixed as
    they like.
    """
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    for parameter in parameters:
        # upstream counts an unmarked parameter in the gradient norm at tp rank 0 only, where other experts live
        is_marked = getattr(parameter, "tensor_model_parallel", False)
        assert getattr(parameter, "allreduce", True) or is_marked or groups.layout.tp == 1, (
            f"an expert of shape {tuple(parameter.shape)} has allreduce=False but not tensor_model_parallel=True"
        )
    has_bf16 = any(parameter.dtype == torch.bfloat16 for parameter in parameters)
    core = CoreOptimizerConfig(
        optimizer="adam",
        lr=0.0,
        bf16=has_bf16,
        params_dtype=torch.bfloat16 if has_bf16 else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.epsilon,
        clip_grad=config.grad_clip,
    )
    few_dims = ParamKey(predicate=ParamPredicate(name="fewer_than_2_dims", fn=lambda p: p.ndim < 2))
    chained = get_megatron_optimizer(
        core,
        list(chunks),
        config_overrides={few_dims: {"wd_mult": 0.0}},
        use_gloo_process_groups=False,
        pg_collection=groups.collection,
    )
    return Optimizer(chained, config, groups.device)


class Optimizer:
    """One AdamW over all chunks of this rank; its state is cut over the data parallel ranks."""

    def __init__(self, chained: Any, config: OptimizerConfig, device: torch.device) -> None:
        self._chained = chained
        for group in chained.param_groups:
            # upstream leaves wd_mult to its own scheduler, which we do not use
            group["weight_decay"] = config.weight_decay * group["wd_mult"]
        self._parts = [_StoredPart(part) for part in chained.chained_optimizers if not part.is_stub_optimizer]
        self._device = device
        self.num_steps = 0
        """Updates done, also by the runs that this one was resumed from."""

    def step(self, learning_rate: float, accepts: Callable[[float], bool] = lambda _norm: True) -> float:
        """Clip, update, and gather the new parameters; the global gradient norm before the clip.

        Args:
            learning_rate: of this step.
            accepts: whether a step with this gradient norm is made, the same on every rank; if not, weights and
                optimizer stay as they are. It is asked with NaN on a rank whose own gradients are no numbers: the norm
                counts parameters that several ranks hold on one of them only.
        """
        for group in self._chained.param_groups:
            group["lr"] = learning_rate
        # megatron-core's own step, with the question between norm and update
        self._chained.prepare_grads()
        grad_norm = self._chained.get_grad_norm()
        if accepts(float(grad_norm) if self._own_gradients_are_finite() else math.nan):
            self._clip(grad_norm)
            self._chained.step_with_ready_grads()
            self.num_steps += 1
        return float(grad_norm)

    @torch.no_grad()
    def squared_norms(self, part_of: Mapping[torch.nn.Parameter, int], num_parts: int) -> torch.Tensor:
        """Squared gradient norms by part of the model, the sum being the square of the global one. Collective.

        Args:
            part_of: the part of every parameter of this rank's chunks, 0 to `num_parts` - 1.
            num_parts: parts of the whole model.

        Returns:
            fp64 [parts] on the host, the same on every rank.
        """
        counted = [pair for part in self._parts for pair in part.gradients()]
        squared = torch.zeros(num_parts, dtype=torch.float64, device=self._device)
        if counted:
            norms = torch.stack(torch._foreach_norm([gradient for _, gradient in counted]))
            places = torch.tensor([part_of[parameter] for parameter, _ in counted], device=self._device)
            squared.index_add_(0, places, norms.double().square())
        dist.all_reduce(squared)
        return squared.cpu()

    def _own_gradients_are_finite(self) -> bool:
        parts = [part for part in self._chained.chained_optimizers if not part.is_stub_optimizer]
        # a sum is a number exactly if all its terms are, far from the largest one
        sums = [buffer.grad_data.sum(dtype=torch.float32) for part in parts for buffer in part.buffers]
        return not sums or bool(torch.stack(sums).isfinite().all())

    def _clip(self, grad_norm: Any) -> None:
        for part in self._chained.chained_optimizers:
            options = part.config
            parameters = [] if part.is_stub_optimizer else part.get_parameters()
            if parameters and options.clip_grad > 0.0:
                clip_grads.clip_grad_by_total_norm_fp32(
                    parameters,
                    max_norm=options.clip_grad,
                    total_norm=grad_norm,
                    use_decoupled_grad=options.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
                )

    def set_grad_clip(self, grad_clip: float) -> None:
        """Clip longer gradients to this norm from now on; 0 is off."""
        for part in self._chained.chained_optimizers:
            part.config.clip_grad = grad_clip

    def zero_grad(self) -> None:
        """Drop the optimizer's gradients; the chunks' gradient buffers are theirs (`zero_grad_buffer`)."""
        self._chained.zero_grad()

    @torch.no_grad()
    def sharded_state(self, model_state: ShardedStateDict) -> ShardedStateDict:
        """The state as sharded tensors in host memory, a snapshot that later steps do not touch. Collective.

        model_state: sharded state of the model chunks (any nesting) whose data are the parameters themselves.
        """
        shardings = _shardings_of(model_state)
        state = self._step_state(self.num_steps)
        for number, part in enumerate(self._parts):
            for index, whole in part.exchange.to_owners(part.pieces()).items():
                state[f"{number}.{index}"] = part.shard(index, whole, shardings)
        return state

    def sharded_template(self, model_state: ShardedStateDict) -> ShardedStateDict:
        """What to load into: like `sharded_state`, with tensors that are still to be filled."""
        shardings = _shardings_of(model_state)
        template = self._step_state(0)
        for number, part in enumerate(self._parts):
            for index in part.exchange.owned:
                template[f"{number}.{index}"] = part.shard(index, part.empty_whole(index), shardings)
        return template

    @torch.no_grad()
    def load_sharded_state(self, loaded: dict[str, Any]) -> None:
        """Take over a state that was loaded into `sharded_template`. Collective.

        Load the model's parameters too, before or after: fp32 parameters are their own masters.
        """
        self.num_steps = int(loaded["step"])
        for number, part in enumerate(self._parts):
            whole = {index: loaded[f"{number}.{index}"] for index in part.exchange.owned}
            part.exchange.to_pieces(whole, part.pieces())
            part.set_step(self.num_steps)

    def take_masters_from_parameters(self) -> None:
        """Make the fp32 masters of 16-bit parameters anew, after weights were loaded without optimizer state."""
        self._chained.reload_model_params()

    @staticmethod
    def _step_state(num_steps: int) -> ShardedStateDict:
        value = torch.tensor([num_steps], dtype=torch.int64)
        return {"step": ShardedTensor.from_rank_offsets("optimizer.step", value, replica_id=dist.get_rank())}


class _StoredPart:
    """One DistributedOptimizer (the dense parameters, or the experts) seen as cut tensors with owners."""

    def __init__(self, part: DistributedOptimizer) -> None:
        self._inner = part.optimizer
        # torch's AdamW has a step tensor per parameter; the fused ones of TE and apex have a number per group
        self._counts_per_parameter = isinstance(self._inner, torch.optim.Adam)
        self._mains = dict(_main_pieces(part))
        self._tp_group = getattr(part, "tp_group", None)
        num_ranks = part.data_parallel_group.size()
        placed = [
            (parameter, _ranges_in_buffer(buffer, parameter, num_ranks))
            for buffer in part.buffers
            for parameter in buffer.param_index_map
        ]
        names = [((MASTER,) if parameter.dtype != torch.float32 else ()) + MOMENTS for parameter, _ in placed]
        weights = [
            parameter.numel() * len(slots) for (parameter, _), slots in zip(placed, names, strict=True)
        ]
        owners = assign_owners(weights, num_ranks)
        self._slots = [
            (parameter, slot, CutTensor(ranges, owner))
            for (parameter, ranges), slots, owner in zip(placed, names, owners, strict=True)
            for slot in slots
        ]
        self.exchange = Exchange([cut for _, _, cut in self._slots], part.data_parallel_group)
        self._allocate()

    def _allocate(self) -> None:
        """Give every piece the state that it gets in the first step anyway, so that there is always one to store."""
        for main in self._mains.values():
            state = self._inner.state[main]
            for name in MOMENTS:
                state[name] = torch.zeros_like(main)
            if self._counts_per_parameter:
                state["step"] = torch.tensor(0.0)

    def set_step(self, num_steps: int) -> None:
        """Set the count that bias correction uses; a tensor per parameter, since AdamW adds to it in place."""
        if not self._counts_per_parameter:
            for group in self._inner.param_groups:
                group["step"] = num_steps
            return
        for main in self._mains.values():
            self._inner.state[main]["step"].fill_(num_steps)

    def gradients(self) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Parameters and this rank's pieces of their gradients, each element once over all ranks, as megatron-core
        counts them in the global norm."""
        for parameter, main in self._mains.items():
            if main.grad is not None and param_is_not_tensor_parallel_duplicate(main, self._tp_group):
                yield parameter, main.grad

    def pieces(self) -> list[torch.Tensor]:
        """This rank's flat pieces of every slot, the live tensors; empty where it holds nothing."""
        return [self._piece(parameter, slot) for parameter, slot, _ in self._slots]

    def _piece(self, parameter: torch.nn.Parameter, slot: str) -> torch.Tensor:
        main = self._mains.get(parameter)
        if main is None:
            return torch.empty(0, dtype=torch.float32, device=parameter.device)
        piece = main if slot == MASTER else self._inner.state[main][slot]
        return piece.detach().view(-1)

    def empty_whole(self, index: int) -> torch.Tensor:
        """Host memory for one whole slot."""
        return torch.empty(self._slots[index][0].shape, dtype=torch.float32)

    def shard(self, index: int, whole: torch.Tensor, shardings: dict[int, Any]) -> Any:
        """One whole slot as a sharded tensor, placed like its parameter, this rank being the owner."""
        parameter, slot, _ = self._slots[index]
        if id(parameter) not in shardings:
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} is not in the model's sharded state: its optimizer "
                "state would have no name; pass the sharded state of all chunks, made with keep_vars=True"
            )
        model = shardings[id(parameter)]
        # (pipeline, tensor, data parallel) replica: the owner stands for all data parallel ranks
        assert isinstance(model.replica_id, tuple) and len(model.replica_id) == 3, (
            model.key,
            model.replica_id,
        )
        changes: dict[str, Any] = {"dtype": whole.dtype} if isinstance(model, ShardedTensor) else {}
        return replace(
            model,
            key=f"optimizer.{slot}.{model.key}",
            data=whole.view(parameter.shape),
            replica_id=(*model.replica_id[:-1], 0),
            **changes,
        )


def _main_pieces(part: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Each parameter that this rank updates a piece of, with the fp32 piece that AdamW updates."""
    for models, mains in (
        (part.model_fp32_groups, part.shard_fp32_groups),
        (part.model_float16_groups, part.shard_fp32_from_float16_groups),
    ):
        for model_group, main_group in zip(models, mains, strict=True):
            yield from zip(model_group, main_group, strict=True)


def _ranges_in_buffer(
    buffer: Any, parameter: torch.nn.Parameter, num_ranks: int
) -> tuple[tuple[int, int], ...]:
    start, stop, bucket_id = buffer.param_index_map[parameter]
    bucket = buffer.buckets[bucket_id]
    return ranges_of(start - bucket.offset, stop - bucket.offset, bucket.grad_data.numel(), num_ranks)


def _shardings_of(model_state: ShardedStateDict) -> dict[int, ShardedTensor | ShardedTensorFactory]:
    """How each parameter is placed in the model, by identity."""
    tensors, _ = extract_sharded_tensors_and_factories(model_state)
    return {id(leaf.data): leaf for leaf in nested_values(tensors)}
