"""The oracle: a tiny random MiniMax model of the transformers library, with its rotary defect repaired.

The native class rotates whole heads, MiniMax's own code the first rotary_dim channels. Everything else
of it agrees with MiniMax's code, so with that one repair it is the reference for logits, gradients and files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import MiniMaxConfig, MiniMaxForCausalLM
from transformers.models.minimax import modeling_minimax

HEAD_DIM, NUM_LAYERS, VOCAB_SIZE = 16, 8, 96
ALPHA = (2 * NUM_LAYERS) ** 0.25


def native_model(seed: int = 0) -> MiniMaxForCausalLM:
    """8 layers 7:1, 4 heads, 2 key/value heads, 4 experts top-2, fp32, eager; weights that matter."""
    config = MiniMaxConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["linear_attention"] * 7 + ["full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        block_size=32,
        attn_implementation="eager",
        experts_implementation="eager",
        **{f"{part}_alpha_factor": ALPHA for part in ("full_attn", "linear_attn", "mlp")},
        **{f"{part}_beta_factor": 0.75 for part in ("full_attn", "linear_attn", "mlp")},
    )
    model = MiniMaxForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return model


def repair_rotary(model: MiniMaxForCausalLM, rotary_dim: int, replace: Callable[..., None]) -> None:
    """Rotate only the first channels of a head, as MiniMax's code does; `replace` is monkeypatch.setattr."""
    theta = model.config.rope_parameters["rope_theta"]
    model.model.rotary_emb.inv_freq = 1.0 / theta ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim)
    whole = modeling_minimax.apply_rotary_pos_emb

    def partial(q, k, cos, sin, unsqueeze_dim=1):
        turned = whole(q[..., :rotary_dim], k[..., :rotary_dim], cos, sin, unsqueeze_dim)
        return tuple(torch.cat([t, x[..., rotary_dim:]], -1) for t, x in zip(turned, (q, k), strict=True))

    replace(modeling_minimax, "apply_rotary_pos_emb", partial)


def logits_one_by_one(model: MiniMaxForCausalLM, documents: list[torch.Tensor]) -> torch.Tensor:
    """Logits [T, P] of documents that the model sees one at a time."""
    return torch.cat([model(document[None], use_cache=False).logits[0] for document in documents])


def published_gradients(model: MiniMaxForCausalLM, directory: Path) -> dict[str, torch.Tensor]:
    """The gradients of all weights under their published names, which only saving gives them."""
    of_gradients = copy.deepcopy(model)
    for target, source in zip(of_gradients.parameters(), model.parameters(), strict=True):
        assert source.grad is not None
        target.data = source.grad.clone()
    of_gradients.save_pretrained(directory)
    return load_file(directory / "model.safetensors")
