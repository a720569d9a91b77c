"""Router decisions on record: noted while a model generates, and taken again while it trains on what was generated.

Two passes over the same tokens differ in their last bits, and where two experts are all but equal a router then chooses
another one: the trained policy is not the one that generated. With replay only the choice is taken from the record; the
weights of the chosen experts are computed anew from the logits, so the router learns as ever.
Legend: T this rank's tokens of a microbatch, t its tp share of them, L all layers of the model, k choices per token.
"""

from __future__ import annotations

import torch


class RoutingRecord:
    """The decisions of one forward pass over one microbatch, for the layers and the tokens of this rank."""

    def __init__(self) -> None:
        self._experts: dict[int, torch.Tensor] = {}

    def note(self, layer: int, experts_tk: torch.Tensor) -> None:
        """Keep int64 [t, k] of a layer, by its global index from 0."""
        self._experts[layer] = experts_tk

    def of_layers(self, layers: list[int]) -> torch.Tensor:
        """int64 [t, layers, k], in the order of `layers`, on the device."""
        return torch.stack([self._experts[layer] for layer in layers], dim=1)


def replayed(
    logits_tE: torch.Tensor, own_tk: torch.Tensor, recorded_tLk: torch.Tensor, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Routing weights [t, k] and experts int64 [t, k] of one layer: the recorded experts, weighted by these logits.

    Args:
        logits_tE: fp32 [t, E]; gradients reach them through the weights.
        own_tk: int64 [t, k], what the router would choose: taken for tokens without a record (-1), as padding is.
        recorded_tLk: integers [t, L, k].
        layer: global index from 0.

    Raises:
        ValueError: the record is of a model with fewer layers or another number of choices.
    """
    if recorded_tLk.shape[1] <= layer or recorded_tLk.shape[2] != own_tk.shape[1]:
        raise ValueError(
            f"recorded experts have shape {tuple(recorded_tLk.shape)}, but layer {layer} chooses {own_tk.shape[1]} "
            "experts per token: a record is [tokens, all layers, choices] of the model that generated; generate with "
            "the model that is trained, or train without the record"
        )
    recorded_tk = recorded_tLk[:, layer].long()
    experts_tk = torch.where(recorded_tk < 0, own_tk, recorded_tk)
    return logits_tE.gather(1, experts_tk).softmax(-1), experts_tk
