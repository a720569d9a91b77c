"""The language-model head in true fp32: weight, logits and both gradients.

MiniMax-M1 found the trainer's and the generator's probabilities apart until the head was fp32 (arXiv 2506.13585,
section 3.2). TF32 would undo that silently, so it is refused here.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear

from megatron_m1.model.config import ModelConfig


class Head(ColumnParallelLinear):
    """Projection to this rank's share of the vocabulary.

    Args:
        config: megatron-core's configuration of this stage.
        model: sizes and numerics; `head_fp32` chooses fp32 or the activations' dtype.
        tp_group: ranks that share the vocabulary.
    """

    def __init__(self, config: Any, model: ModelConfig, tp_group: torch.distributed.ProcessGroup) -> None:
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
