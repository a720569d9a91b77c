"""One training step on any layout: forward, backward and gradient reduction over all microbatches.

Every denominator comes from the global batch: losses are divided by the number of loss tokens of the whole step,
counted before the first forward pass, so gradients are sums and no split of the batch changes them.
Legend: T tokens of a microbatch, L layers, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_m1.model.hybrid import HybridModel
from megatron_m1.training.batch import Microbatch
from parallel.groups import Groups

Objective = Callable[[Any, torch.Tensor], torch.Tensor]
"""(microbatch, next-token losses in nats [T]) -> this microbatch's share of the loss: a sum that nothing divides
again. Called on the last pipeline stage only."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step measured, the same on every rank."""

    loss_nats: float
    """Mean next-token loss over the loss tokens of the global batch, or the sum of the objective's shares; without the
    auxiliary loss."""
    loss_tokens: int
    """Tokens that counted."""
    auxiliary_loss: float
    """Load-balancing loss before its coefficient: mean over rows, summed over layers."""
    tokens_per_expert_LE: torch.Tensor
    """fp32 [L, E]: routed tokens of the step that were kept."""
    dropped_share: float
    """Share of expert choices dropped by capacity."""

    def expert_load(self, ep: int) -> dict[str, float | int]:
        """How evenly experts and the ranks of expert parallelism were used, as metrics; the worst layer counts.

        ep: size of expert parallelism; the experts of a rank lie side by side.
        """
        load_LE = self.tokens_per_expert_LE
        load_LR = load_LE.unflatten(1, (ep, -1)).sum(2)
        load_E = load_LE.sum(0)
        shares_E = (load_E / load_E.sum().clamp(min=1)).tolist()
        return {
            "dropped_share": self.dropped_share,
            "busiest_expert_over_mean": _most_over_mean(load_LE),
            "busiest_ep_rank_over_mean": _most_over_mean(load_LR),
            "busiest_ep_rank_tokens": int(load_LR.amax()),
            **{f"expert_share/{expert}": share for expert, share in enumerate(shares_E)},
        }


def _most_over_mean(load_LX: torch.Tensor) -> float:
    return float((load_LX.amax(1) / load_LX.mean(1).clamp(min=1)).amax())


def wrap_for_gradients(
    chunks: Sequence[HybridModel], groups: Groups, *, overlap: bool = False
) -> list[DistributedDataParallel]:
    """Give every chunk fp32 gradient buffers that are summed over data parallelism and sharded for the optimizer.

    Args:
        chunks: this rank's model chunks.
        groups: process groups.
        overlap: start the reduction of a bucket while backward still runs.
    """
    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=overlap
    )
    wrapped = [
        DistributedDataParallel(
            chunk.config, options, chunk, disable_bucketing=index > 0, pg_collection=groups.collection
        )
        for index, chunk in enumerate(chunks)
    ]
    config = chunks[0].config
    config.finalize_model_grads_func = functools.partial(_finalize, groups)
    if overlap:
        syncs = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
    return wrapped


def count_loss_tokens(microbatches: Sequence[Microbatch], groups: Groups) -> int:
    """Loss tokens of the global batch: every rank's piece of its microbatches, each token counted once."""
    count = torch.stack([microbatch.loss_mask_T.sum() for microbatch in microbatches]).sum().double()
    dist.all_reduce(count, group=groups.collection.dp_cp)
    return int(count.item())


def run_microbatches(
    chunks: Sequence[DistributedDataParallel],
    microbatches: Sequence[Microbatch],
    groups: Groups,
    *,
    forward_only: bool = False,
    reduce_everywhere: bool = False,
    objective: Objective | None = None,
) -> StepResult:
    """Run all microbatches of a step; afterwards each rank holds its share of the reduced gradients.

    Args:
        chunks: from `wrap_for_gradients`, gradients zeroed.
        microbatches: this rank's piece of its data-parallel rank's microbatches, all of one length.
        groups: process groups.
        forward_only: evaluate, with no gradients.
        reduce_everywhere: leave whole reduced gradients on every rank, not the optimizer's shards.
        objective: what is minimised; None: the mean next-token loss over the loss tokens.
    """
    loss_tokens = count_loss_tokens(microbatches, groups)
    for chunk in chunks:
        chunk.train(not forward_only)
    losses = get_forward_backward_func()(
        forward_step_func=functools.partial(_forward, objective or _MeanLoss(max(1, loss_tokens))),
        data_iterator=[iter(microbatches) for _ in chunks] if len(chunks) > 1 else iter(microbatches),
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(microbatches),
        # of the whole microbatch: megatron-core divides by cp and tp itself
        seq_length=microbatches[0].packed.split.num_tokens,
        micro_batch_size=1,
        forward_only=forward_only,
        force_all_reduce=reduce_everywhere,
    )
    return _gather_result(chunks, losses, loss_tokens, groups)


def _forward(
    objective: Objective, microbatches: Iterator[Microbatch], chunk: DistributedDataParallel
) -> tuple[torch.Tensor, functools.partial]:
    """megatron-core's forward step: a chunk's output, and how its losses become a number."""
    microbatch = next(microbatches)
    output = chunk(microbatch.tokens_T, microbatch.packed, microbatch.labels_T)
    return output, functools.partial(_share, objective, microbatch)


def _share(
    objective: Objective, microbatch: Microbatch, losses_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This microbatch's share of the loss; the count beside it is megatron-core's, and nothing divides by it."""
    share = objective(microbatch, losses_T.float())
    return share, torch.ones((), dtype=torch.int), share.detach()


@dataclass(frozen=True, slots=True)
class _MeanLoss:
    """The mean next-token loss."""

    loss_tokens: int

    def __call__(self, microbatch: Microbatch, losses_T: torch.Tensor) -> torch.Tensor:
        return (losses_T * microbatch.loss_mask_T).sum() / self.loss_tokens


def _finalize(
    groups: Groups, chunks: list[DistributedDataParallel], _num_tokens: object = None, **options: object
) -> None:
    """Reduce gradients over all axes. The losses were already divided, so megatron-core must not divide again."""
    finalize_model_grads(chunks, None, force_all_reduce=bool(options.get("force_all_reduce", False)))
    layout = groups.layout
    if layout.tp > 1 and not layout.splits_tokens:
        # the routers' tokens are split over tp even without sequence parallelism; megatron-core sums such partial
        # gradients only with it
        for chunk in chunks:
            for _, router in chunk.module.routers():
                dist.all_reduce(router.weight.main_grad, group=groups.collection.tp)


def _gather_result(
    chunks: Sequence[DistributedDataParallel], losses: list[torch.Tensor], loss_tokens: int, groups: Groups
) -> StepResult:
    """Add up every rank's share of the step's numbers in one all-reduce."""
    config = chunks[0].config
    layers, experts = config.num_layers, config.num_moe_experts
    # per layer: auxiliary loss, dropped choices, tokens per expert; the last number is the loss
    numbers = torch.zeros(layers * (2 + experts) + 1, dtype=torch.float64, device=groups.device)
    per_layer = numbers[:-1].view(layers, 2 + experts)
    for chunk in chunks:
        for layer, router in chunk.module.routers():
            load = router.take_load()
            if load:
                per_layer[layer, 0] = load["auxiliary_loss"]
                per_layer[layer, 1] = load["dropped"]
                per_layer[layer, 2:] = load["tokens_per_expert"]
    if losses and groups.counts_its_tokens:
        numbers[-1] = torch.stack(losses).sum()
    dist.all_reduce(numbers)
    per_layer = numbers[:-1].view(layers, 2 + experts).cpu()
    dropped, kept = per_layer[:, 1].sum(), per_layer[:, 2:].sum()
    return StepResult(
        loss_nats=float(numbers[-1]),
        loss_tokens=loss_tokens,
        auxiliary_loss=float(per_layer[:, 0].sum()),
        tokens_per_expert_LE=per_layer[:, 2:].float(),
        dropped_share=float(dropped / (dropped + kept).clamp(min=1)),
    )
