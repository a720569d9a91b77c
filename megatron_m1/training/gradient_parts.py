"""Gradient norms by part of the model: each kind of layer at each depth, whatever the layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_m1.model.config import ModelConfig
from megatron_m1.model.hybrid import HybridModel
from megatron_m1.training.optimizer import Optimizer

_OUTSIDE = {"embedding": "embedding", "output_layer": "head", "decoder": "final norm"}
"""Part of a parameter outside the layers, by the first word of its name."""


class GradientParts:
    """Names the parts of a model and measures them; the names are the same on every rank and in every layout."""

    def __init__(self, model: ModelConfig, chunks: Sequence[HybridModel], optimizer: Optimizer) -> None:
        """model: its layers. chunks: this rank's. optimizer: holds their reduced gradients."""
        by_layer = [
            f"{kind} {layer}"
            for layer, attention in enumerate(model.layer_kinds)
            for kind in (attention, "router", "experts", "norms")
        ]
        self.names: tuple[str, ...] = ("embedding", *by_layer, "final norm", "head")
        """Parts from the bottom of the network to its top; those of a layer are `KIND LAYER`, counted from 0."""
        self._optimizer = optimizer
        place = {name: index for index, name in enumerate(self.names)}
        self._part_of: dict[torch.nn.Parameter, int] = {}
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                self._part_of[parameter] = place[_part(name, chunk)]

    def norms(self) -> list[float]:
        """The gradient's L2 norm of every part, in the order of `names`. Collective; to be asked where the optimizer
        asks whether a step is made, for clipping changes gradients in place."""
        return self._optimizer.squared_norms(self._part_of, len(self.names)).sqrt().tolist()


def _part(name: str, chunk: HybridModel) -> str:
    """The part that a parameter of a chunk belongs to."""
    words = name.split(".")
    if words[:2] != ["decoder", "layers"]:
        return _OUTSIDE[words[0]]
    layer = chunk.decoder.layers[int(words[2])].layer_number - 1
    if words[3] == "attention":
        kind: str = chunk.model.layer_kinds[layer]
    elif words[3] == "moe":
        kind = "router" if words[4] == "router" else "experts"
    else:
        kind = "norms"
    return f"{kind} {layer}"
