"""Mixture of experts: the router with its load-balancing loss and capacity, and the layer around the dispatcher.

Dispatch and combine are megatron-core's, in dropless layers with our row moves (parallel/dispatch.py); the routing
decision is ours, because every number in it must depend on the rows of the global batch alone, never on how they are
split: the auxiliary loss and the capacity have ROW scope.
Legend: T tokens of the microbatch, t this rank's share, E experts, k experts per token, B rows, D width.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from torch import nn

from kernels_cuda.moe.op import moe_route
from megatron_m1.model.config import ModelConfig
from megatron_m1.model.packed import Packed
from megatron_m1.model.routing import replayed
from parallel.dispatch import AllToAllDispatcher
from parallel.experts import EXPERTS
from parallel.split import Split


class Router(MegatronModule):
    """Top-k softmax router: weights are the softmax over the chosen logits.

    Args:
        config: megatron-core's configuration of this stage.
        model: sizes and numerics.
        layer: global index from 0: where its decisions stand in a record.
        groups: megatron-core's process groups; the tokens of a microbatch are split over tp and cp.
    Source: MiniMax-01 (arXiv 2501.08313), section 2.1, eq. 1.
    """

    def __init__(self, config: Any, model: ModelConfig, layer: int, groups: Any) -> None:
        super().__init__(config)
        self.model, self.layer = model, layer
        self.tp_group, self.token_group = groups.tp, groups.tp_cp
        dtype = torch.float32 if model.router_fp32 else config.params_dtype
        self.weight = nn.Parameter(torch.empty(model.num_experts, model.hidden_size, dtype=dtype))
        # its tokens are always split over tp, so its gradient is partial on each of those ranks
        self.weight.sequence_parallel = True  # type: ignore[attr-defined]
        self.last_load: dict[str, torch.Tensor] = {}

    def forward(self, x_SBD: torch.Tensor, packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        """Route this rank's tokens [t, 1, D]: weights [t, E] (zero where not chosen) and the map [t, E] bool."""
        x_tD = x_SBD.flatten(0, 1).to(self.weight.dtype)
        logits_tE = nn.functional.linear(x_tD, self.weight).float()
        weights_tk, experts_tk = self._choose(logits_tE, packed)
        chosen_tE = torch.zeros_like(logits_tE, dtype=torch.bool).scatter(1, experts_tk, True)
        weights_tE = torch.zeros_like(logits_tE).scatter(1, experts_tk, weights_tk)
        kept_tE = self._keep_within_capacity(weights_tE, chosen_tE, packed)
        if torch.is_grad_enabled() and self.training:
            weights_tE = self._add_auxiliary_loss(weights_tE, logits_tE, chosen_tE, kept_tE, packed)
        return weights_tE * kept_tE, kept_tE

    def _choose(self, logits_tE: torch.Tensor, packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and experts [t, k] of this rank's tokens: the k best, or those on record."""
        weights_tk, experts_tk = moe_route(logits_tE, self.model.experts_per_token)
        if packed.experts_TLk is not None:
            recorded_tLk = self._own_share(packed.experts_TLk)
            weights_tk, experts_tk = replayed(logits_tE, experts_tk, recorded_tLk, self.layer)
        if packed.record is not None:
            packed.record.note(self.layer, experts_tk)
        return weights_tk, experts_tk

    def _keep_within_capacity(
        self, weights_tE: torch.Tensor, chosen_tE: torch.Tensor, packed: Packed
    ) -> torch.Tensor:
        """Of every row, each expert keeps its highest-weighted tokens up to its capacity."""
        # generation drops nothing: which tokens share a pass is chance, and no sample may depend on it
        if self.model.capacity_factor is None or packed.extension is not None:
            return chosen_tE
        scores_TE = self._gather(torch.where(chosen_tE, weights_tE, -1.0).detach(), packed)
        scores_BSE = scores_TE.view(-1, packed.row_tokens, self.model.num_experts)
        even_load = packed.row_tokens * self.model.experts_per_token / self.model.num_experts
        capacity = min(packed.row_tokens, math.ceil(self.model.capacity_factor * even_load))
        # a stable sort breaks ties by position, so the choice is the same on every rank and in every layout
        order = scores_BSE.argsort(dim=1, descending=True, stable=True)[:, :capacity]
        kept_TE = torch.zeros_like(scores_BSE, dtype=torch.bool).scatter(1, order, True).flatten(0, 1)
        return chosen_tE & self._own_share(packed.split.cut(kept_TE, packed.rank))

    def _add_auxiliary_loss(
        self,
        weights_tE: torch.Tensor,
        logits_tE: torch.Tensor,
        chosen_tE: torch.Tensor,
        kept_tE: torch.Tensor,
        packed: Packed,
    ) -> torch.Tensor:
        """Attach the load-balancing loss of this microbatch's rows to the routing weights, and note the load.

        minimax01:   (1/E) sum_i f_i m_i, f_i = fraction of the tokens' choices (sums to 1), m_i = mean probability
        huggingface: E sum_i f_i m_i,     f_i = choices per token (sums to k)
        Deviation from MiniMax-01 eq. 2 in scope only: it averages over an undisclosed set of tokens; we take it per
        row of the global batch, then the mean over rows and the sum over layers.
        """
        share_BE, mean_BE = self._row_means(torch.stack([chosen_tE.float(), logits_tE.softmax(-1)]), packed)
        if self.model.auxiliary_form == "minimax01":
            rows_B = (share_BE / self.model.experts_per_token * mean_BE).sum(-1) / self.model.num_experts
        else:
            rows_B = (share_BE * mean_BE).sum(-1) * self.model.num_experts
        loss = rows_B.sum() * packed.auxiliary_weight
        self._note_load(loss, kept_tE, chosen_tE)
        if self.model.auxiliary_coefficient == 0:
            return weights_tE
        return _AddLoss.apply(weights_tE, self.model.auxiliary_coefficient * loss)

    def _note_load(self, loss: torch.Tensor, kept_tE: torch.Tensor, chosen_tE: torch.Tensor) -> None:
        """Keep running sums of this step for the metrics; `take_load` empties them."""
        noted = {
            # all ranks of the rows compute the same losses: one share each, so that a sum over ranks counts them once
            "auxiliary_loss": loss.detach() / self.token_group.size(),
            "tokens_per_expert": kept_tE.sum(0).float(),
            "dropped": (chosen_tE & ~kept_tE).sum().float(),
        }
        for name, value in noted.items():
            self.last_load[name] = self.last_load.get(name, 0.0) + value

    def take_load(self) -> dict[str, torch.Tensor]:
        """This rank's share of the step's auxiliary loss, tokens per expert [E] and dropped choices; then forget."""
        load, self.last_load = self.last_load, {}
        return load

    def _row_means(self, x_2tE: torch.Tensor, packed: Packed) -> torch.Tensor:
        """Means over the tokens of each row, wherever they are, [2, B, E].

        Every rank then computes the same, so the gradient of its own tokens is the whole gradient: the transpose of
        this sum over ranks reduces nothing.
        """
        rows_BT = _row_membership(packed.split, packed.rank, packed.row_tokens, x_2tE.device)
        own_Bt = rows_BT.chunk(self.tp_group.size(), dim=1)[self.tp_group.rank()]
        sums_2BE = own_Bt @ x_2tE
        return reduce_from_tensor_model_parallel_region(sums_2BE, group=self.token_group) / packed.row_tokens

    def _gather(self, x_tE: torch.Tensor, packed: Packed) -> torch.Tensor:
        """Every rank's [t, E] -> the microbatch's [T, E] in its order; without gradient."""
        if self.token_group.size() == 1:
            return x_tE
        parts = x_tE.new_empty(self.token_group.size() * len(x_tE), x_tE.shape[1])
        torch.distributed.all_gather_into_tensor(parts, x_tE.contiguous(), group=self.token_group)
        return packed.split.join(parts.chunk(packed.split.num_ranks))

    def _own_share(self, x_TE: torch.Tensor) -> torch.Tensor:
        return x_TE.chunk(self.tp_group.size())[self.tp_group.rank()]


@functools.lru_cache(maxsize=16)
def _row_membership(split: Split, rank: int, row_tokens: int, device: torch.device) -> torch.Tensor:
    """1.0 where a token of a rank (columns) is in a row of the microbatch (rows), fp32 [B, T of the rank]."""
    row_of_T = split.token_numbers(rank) // row_tokens
    return (torch.arange(split.num_tokens // row_tokens)[:, None] == row_of_T).float().to(device)


class _AddLoss(torch.autograd.Function):
    """Passes a tensor through and adds a scalar loss to what will be differentiated; its transpose is the number 1."""

    @staticmethod
    def forward(ctx: Any, carrier: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.loss_like = loss.detach()
        return carrier

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradients[0], torch.ones_like(ctx.loss_like)


class MixtureOfExperts(MoELayer):
    """The expert layer: split the tokens over tp, route, dispatch, compute, combine.

    Without sequence parallelism the tokens arrive whole on every tp rank; they are split here and joined after, so
    that no rank routes the same token twice.

    Args:
        config: megatron-core's configuration of this stage.
        model: sizes and numerics.
        layer: global index from 0.
        groups: megatron-core's process groups.
    """

    def __init__(self, config: Any, model: ModelConfig, layer: int, groups: Any) -> None:
        def build_router(*, config: Any, pg_collection: Any) -> Router:
            return Router(config, model, layer, pg_collection)

        experts = EXPERTS[model.experts]
        super().__init__(config, MoESubmodules(experts=experts, router=build_router), pg_collection=groups)
        if config.moe_token_dispatcher_type == "alltoall" and model.capacity_factor is None:
            self.token_dispatcher = AllToAllDispatcher(
                self.num_local_experts, self.local_expert_indices, config, groups
            )
        self.splits_here = groups.tp.size() > 1 and not config.sequence_parallel

    def forward(self, x_SBD: torch.Tensor, packed: Packed) -> torch.Tensor:  # type: ignore[override]
        """[T or T/tp, 1, D] -> same shape."""
        if self.splits_here:
            x_SBD = scatter_to_sequence_parallel_region(x_SBD, group=self.tp_group)
        weights_tE, map_tE = self.router(x_SBD, packed)
        rows, weights = self.token_dispatcher.dispatch_preprocess(x_SBD, map_tE, weights_tE)
        rows, weights = self.dispatch(rows, weights)
        y, _ = self.routed_experts_compute(rows, weights)
        y_SBD = self.token_dispatcher.combine_postprocess(self.combine(y))
        if self.splits_here:
            y_SBD = gather_from_sequence_parallel_region(
                y_SBD, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return y_SBD
