"""The language-model head in true fp32: weight, logits, loss and gradients, never all logits of a long microbatch.

MiniMax-M1 found the trainer's and the generator's probabilities apart until the head was fp32 (arXiv 2506.13585,
section 3.2). TF32 would undo that silently, so it is refused here.
The loss is the cross entropy over a vocabulary that is split over tp, taken in chunks of tokens:
    loss_t = lse_t - z_t[label],  lse_t = log sum_p exp z_tp;   dz_tp = dloss_t (exp(z_tp - lse_t) - [p = label])
Forward keeps lse alone and backward computes each chunk's logits again, unless one chunk holds them all.
Legend: T tokens, t this rank's share of them under sequence parallelism, C tokens of a chunk, D width, p this rank's
share of the vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear

from megatron_m1.model.config import ModelConfig
from megatron_m1.model.memory import LOGITS_MIB


class Head(ColumnParallelLinear):
    """Projection to this rank's share of the vocabulary.

    Args:
        config: megatron-core's configuration of this stage.
        model: sizes and numerics; `head_fp32` chooses fp32 or the activations' dtype.
        tp_group: ranks that share the vocabulary.
        logits_mib: most fp32 logits that the loss holds at once, in MiB; fewer tokens than fit need no recomputation.
    """

    def __init__(
        self, config: Any, model: ModelConfig, tp_group: dist.ProcessGroup, logits_mib: int = LOGITS_MIB
    ) -> None:
        config = copy.copy(config)
        if model.head_fp32:
            config.params_dtype = torch.float32
        super().__init__(
            model.hidden_size,
            model.vocab_size,
            config=config,
            init_method=None,
            bias=False,
            gather_output=False,
            skip_bias_add=True,
            tp_group=tp_group,
        )
        self.tokens_per_chunk = max(1, logits_mib * 2**20 // (4 * self.weight.shape[0]))

    def forward(  # type: ignore[override]
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor, None]:
        """[T or T/tp, 1, D] -> logits [T, 1, P/tp] in the weight's dtype.

        Raises:
            ValueError: fp32 matmuls may be rounded to TF32 or bf16 in this process.
        """
        if self.weight.dtype == torch.float32:
            _require_full_fp32()
        return super().forward(input_.to(self.weight.dtype), weight, runtime_gather_output)

    def losses(self, hidden_SBD: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        """Cross entropy of every token in nats, fp32 [T], the same on all tp ranks; minus the label's log-probability.

        Args:
            hidden_SBD: [T, 1, D], or [T/tp, 1, D] under sequence parallelism.
            labels_T: int64 [T], below the whole vocabulary's size.

        Raises:
            ValueError: as `forward`.
        """
        if self.weight.dtype == torch.float32:
            _require_full_fp32()
        share = _VocabularyShare(
            self.tp_group,
            self.tp_group.rank() * self.weight.shape[0],
            self.sequence_parallel,
            self.tokens_per_chunk,
        )
        return _ChunkedCrossEntropy.apply(hidden_SBD.flatten(0, 1), self.weight, labels_T, share)


@dataclass(frozen=True, slots=True)
class _VocabularyShare:
    """This rank's part in the loss."""

    group: dist.ProcessGroup
    first: int
    """Vocabulary entry of the weight's first row."""
    tokens_are_split: bool
    """Sequence parallelism: the hidden states of the other ranks' tokens are gathered here."""
    tokens_per_chunk: int

    def gather(self, x_tD: torch.Tensor) -> torch.Tensor:
        """All tokens; the transpose is `sum_back`."""
        if not self.tokens_are_split:
            return x_tD
        x_TD = x_tD.new_empty(self.group.size() * len(x_tD), x_tD.shape[1])
        dist.all_gather_into_tensor(x_TD, x_tD.contiguous(), group=self.group)
        return x_TD

    def sum_back(self, dx_TD: torch.Tensor) -> torch.Tensor:
        """Sum the gradients of all vocabulary shares, each rank keeping its tokens; the transpose of `gather`."""
        if self.group.size() == 1:
            return dx_TD
        if not self.tokens_are_split:
            dist.all_reduce(dx_TD, group=self.group)
            return dx_TD
        dx_tD = dx_TD.new_empty(len(dx_TD) // self.group.size(), dx_TD.shape[1])
        dist.reduce_scatter_tensor(dx_tD, dx_TD, group=self.group)
        return dx_tD

    def chunks(self, tokens: int) -> Iterator[slice]:
        """Chunks of about equal size."""
        count = -(-tokens // self.tokens_per_chunk)
        for i in range(count):
            yield slice(tokens * i // count, tokens * (i + 1) // count)

    def own_labels(self, labels_T: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Row of the weight of each label, anything where another rank has it, and whether it is ours."""
        local_T = labels_T - self.first
        return local_T.clamp(0, size - 1)[:, None], (local_T >= 0) & (local_T < size)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Head and loss in one, so that logits need not outlive their chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_tD: torch.Tensor,
        weight_pD: torch.Tensor,
        labels_T: torch.Tensor,
        share: _VocabularyShare,
    ) -> torch.Tensor:
        x_TD = share.gather(hidden_tD)
        rows_T1, ours_T = share.own_labels(labels_T, len(weight_pD))
        lse_T = x_TD.new_empty(len(x_TD), dtype=torch.float32)
        label_T = torch.empty_like(lse_T)
        exps_Cp, largest_C = None, label_T
        for chunk in share.chunks(len(x_TD)):
            logits_Cp = _logits(x_TD[chunk], weight_pD)
            label_T[chunk] = logits_Cp.gather(1, rows_T1[chunk])[:, 0]
            largest_C = logits_Cp.amax(1)
            exps_Cp = logits_Cp.sub_(largest_C[:, None]).exp_()
            lse_T[chunk] = exps_Cp.sum(1).log_().add_(largest_C)
        if share.group.size() > 1:
            lse_T, label_T = _over_all_shares(lse_T, label_T * ours_T, share.group)
        kept = []
        if any(ctx.needs_input_grad) and len(x_TD) <= share.tokens_per_chunk and exps_Cp is not None:
            kept = [exps_Cp.mul_((largest_C - lse_T).exp_()[:, None])]
        ctx.save_for_backward(hidden_tD, weight_pD, labels_T, lse_T, *kept)
        ctx.share = share
        return lse_T - label_T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        hidden_tD, weight_pD, labels_T, lse_T, *kept = ctx.saved_tensors
        share, dloss_T = ctx.share, gradients[0]
        x_TD = share.gather(hidden_tD)
        rows_T1, ours_T = share.own_labels(labels_T, len(weight_pD))
        # partial sums of several ranks are rounded once, after they are added
        dx_TD = torch.empty_like(x_TD, dtype=x_TD.dtype if share.group.size() == 1 else torch.float32)
        dweight_pD = torch.zeros_like(weight_pD, dtype=torch.float32)
        for chunk in share.chunks(len(x_TD)):
            x_CD, dloss_C1 = x_TD[chunk].to(weight_pD.dtype), dloss_T[chunk, None]
            p_Cp = kept[0] if kept else _logits(x_CD, weight_pD).sub_(lse_T[chunk, None]).exp_()
            p_Cp.mul_(dloss_C1).scatter_add_(1, rows_T1[chunk], -dloss_C1 * ours_T[chunk, None])
            dlogits_Cp = p_Cp.to(weight_pD.dtype)
            dx_TD[chunk] = dlogits_Cp @ weight_pD
            if weight_pD.dtype == torch.float32:
                dweight_pD.addmm_(dlogits_Cp.t(), x_CD)
            else:
                dweight_pD += dlogits_Cp.t() @ x_CD
        return share.sum_back(dx_TD).to(hidden_tD.dtype), dweight_pD.to(weight_pD.dtype), None, None


def _logits(x_CD: torch.Tensor, weight_pD: torch.Tensor) -> torch.Tensor:
    return (x_CD.to(weight_pD.dtype) @ weight_pD.t()).float()


def _over_all_shares(
    lse_T: torch.Tensor, label_T: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp over the whole vocabulary, and the label's logit from the rank that has it."""
    largest_T = lse_T.clone()
    dist.all_reduce(largest_T, op=dist.ReduceOp.MAX, group=group)
    sums_2T = torch.stack([(lse_T - largest_T).exp_(), label_T])
    dist.all_reduce(sums_2T, group=group)
    return sums_2T[0].log_().add_(largest_T), sums_2T[1]


def _require_full_fp32() -> None:
    # read the per-backend switches: torch's older getter raises once one of the newer ones has been set
    backends = {"cuda": torch.backends.cuda.matmul, "mkldnn": torch.backends.mkldnn.matmul}
    rounded = {name: place.fp32_precision for name, place in backends.items()}
    rounded = {name: precision for name, precision in rounded.items() if precision not in ("none", "ieee")}
    if rounded:
        raise ValueError(
            f"float32 matmul precision is {rounded}: the fp32 head needs 'ieee' (or 'none', its default), anything "
            "else rounds it to TF32 or bf16; remove the call of torch.set_float32_matmul_precision or of a "
            "fp32_precision switch, or set model.head_fp32=false"
        )
