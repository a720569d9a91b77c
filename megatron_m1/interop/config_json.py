"""config.json of a published MiniMax model <-> our ModelConfig, in both dialects.

released: the modeling code of MiniMax-M1 and MiniMax-Text-01 (attn_type_list, layernorm_*_alpha, rotary_dim).
native: the class inside transformers (layer_types, *_alpha_factor, rope_parameters); it rotates whole heads
whatever the file says, so a native file need not name the rotary dimension its weights were trained with.
Training numbers are not carried: coefficients of the auxiliary loss mean different things in different code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from megatron_m1.model.config import LayerKind, ModelConfig

Dialect = Literal["released", "native"]

_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "ffn_size": "intermediate_size",
    "vocab_size": "vocab_size",
}
_KINDS: dict[Any, LayerKind] = {
    0: "lightning",
    1: "softmax",
    "linear_attention": "lightning",
    "full_attention": "softmax",
}
_ALPHAS = {
    "released": [f"layernorm_{part}_{{}}" for part in ("linear_attention", "full_attention", "mlp")],
    "native": [f"{part}_{{}}_factor" for part in ("linear_attn", "full_attn", "mlp")],
}
# what our model does not have, and the value under which it is absent
_ABSENT = {
    "quantization_config": (None, "take the unquantised checkpoint"),
    "sliding_window": (None, "only models that attend to all earlier tokens can be converted"),
    "rope_scaling": (
        None,
        "only unscaled rotary frequencies can be converted; set the base through rope_theta",
    ),
    "shared_intermediate_size": (0, "only models without a shared expert can be converted"),
    "attention_bias": (False, "only models without biases can be converted"),
    "use_bias": (False, "only models without biases can be converted"),
    "mlp_bias": (False, "only models without biases can be converted"),
    "tie_word_embeddings": (False, "only models with a head of their own can be converted"),
    "hidden_act": ("silu", "only SiLU models can be converted"),
    "postnorm": (True, "only post-norm models can be converted"),
    "attention_dropout": (0, "we train without dropout; set it to 0 if that is meant"),
    "router_jitter_noise": (0, "we train without router noise; set it to 0 if that is meant"),
}


def read_config(directory: Path, *, rotary_dim: int | None = None) -> ModelConfig:
    """ModelConfig of the checkpoint in `directory`.

    Args:
        directory: holds config.json.
        rotary_dim: rotated channels per head, for a native file that does not say; one that does must agree.

    Raises:
        ValueError: no such file, not a MiniMax model, or a part that our model does not have.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: a checkpoint has a config.json beside its weights; give the directory "
            "that holds it"
        )
    return model_from_json(json.loads(path.read_text()), rotary_dim=rotary_dim)


def model_from_json(fields: dict[str, Any], *, rotary_dim: int | None = None) -> ModelConfig:
    """ModelConfig of a parsed config.json; see `read_config`."""
    dialect = _dialect(fields)
    for name, (allowed, advice) in _ABSENT.items():
        # a null means the class's own default, which is the absent one for all of these
        if fields.get(name) not in (None, allowed):
            raise ValueError(
                f"config.json has {name}={fields[name]!r}: it must be {allowed!r} or absent; {advice}"
            )
    sizes = {ours: _required(fields, theirs) for ours, theirs in _SIZES.items() if ours != "head_dim"}
    head_dim = fields.get("head_dim") or sizes["hidden_size"] // sizes["num_heads"]
    _check_heads(dialect, sizes["num_heads"])
    rotary = fields.get("rope_parameters") or {}
    if rotary.get("rope_type", "default") != "default":
        raise ValueError(
            f"config.json has rope_type={rotary['rope_type']!r}: it must be 'default'; only unscaled rotary "
            "frequencies can be converted"
        )
    return ModelConfig(
        **sizes,
        head_dim=head_dim,
        softmax_every=_softmax_every(dialect, fields, sizes["num_layers"]),
        rotary_dim=_rotary_dim(fields, rotary, head_dim, rotary_dim),
        rotary_base=float(rotary.get("rope_theta") or _required(fields, "rope_theta")),
        norm_eps=_required(fields, "rms_norm_eps"),
        residual_alpha=_one_of_three(dialect, fields, "alpha"),
        residual_beta=_one_of_three(dialect, fields, "beta"),
    )


def json_from_model(model: ModelConfig, dialect: Dialect, *, max_position_embeddings: int) -> dict[str, Any]:
    """Contents of config.json for other software to load our weights with.

    Args:
        model: ours.
        dialect: whose names to write.
        max_position_embeddings: longest context in tokens the weights were trained for; the model computes
            nothing with it.

    Raises:
        ValueError: heads whose decays the native class would compute differently.
    """
    _check_heads(dialect, model.num_heads)
    lightning, softmax = (0, 1) if dialect == "released" else ("linear_attention", "full_attention")
    kinds = [softmax if kind == "softmax" else lightning for kind in model.layer_kinds]
    fields: dict[str, Any] = {theirs: getattr(model, ours) for ours, theirs in _SIZES.items()}
    for name in _ALPHAS[dialect]:
        fields[name.format("alpha")], fields[name.format("beta")] = model.alpha, model.residual_beta
    fields |= {
        "rms_norm_eps": model.norm_eps,
        "rotary_dim": model.rotary_dim,
        "max_position_embeddings": max_position_embeddings,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if dialect == "released":
        return fields | {
            "architectures": ["MiniMaxM1ForCausalLM"],
            "model_type": "minimax_m1",
            "attn_type_list": kinds,
            "rope_theta": model.rotary_base,
            "postnorm": True,
            "shared_intermediate_size": 0,
        }
    partial = model.rotary_dim / model.head_dim
    return fields | {
        "architectures": ["MiniMaxForCausalLM"],
        "model_type": "minimax",
        "layer_types": kinds,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": model.rotary_base,
            "partial_rotary_factor": partial,
        },
    }


def _dialect(fields: dict[str, Any]) -> Dialect:
    if "attn_type_list" in fields:
        return "released"
    if "layer_types" in fields:
        return "native"
    raise ValueError(
        f"config.json of model_type={fields.get('model_type')!r} names no layer pattern: a MiniMax model has "
        "attn_type_list (MiniMax's code) or layer_types (transformers); add the one its weights were trained "
        "with"
    )


def _required(fields: dict[str, Any], name: str) -> Any:
    if fields.get(name) is None:
        raise ValueError(
            f"config.json lacks {name}: its value decides what the weights compute, no default is assumed; "
            "add it from the model's own documentation"
        )
    return fields[name]


def _check_heads(dialect: Dialect, num_heads: int) -> None:
    if dialect == "native" and num_heads & (num_heads - 1):
        raise ValueError(
            f"num_attention_heads={num_heads} in the native dialect: the transformers class has other decays "
            "than "
            "MiniMax's code unless it is a power of two; use the released dialect"
        )


def _softmax_every(dialect: Dialect, fields: dict[str, Any], num_layers: int) -> int:
    """The n of our pattern, every n-th layer softmax; n > num_layers where no layer is."""
    name = "attn_type_list" if dialect == "released" else "layer_types"
    kinds = tuple(_KINDS.get(kind, kind) for kind in fields[name])
    softmax_every = kinds.index("softmax") + 1 if "softmax" in kinds else num_layers + 1
    expected = tuple("lightning" if (layer + 1) % softmax_every else "softmax" for layer in range(num_layers))
    if kinds != expected:
        raise ValueError(
            f"config.json has {name}={fields[name]}: our layers repeat 'n - 1 lightning, then one softmax' "
            "over "
            f"num_hidden_layers={num_layers}; this pattern cannot be converted"
        )
    return softmax_every


def _rotary_dim(fields: dict[str, Any], rotary: dict[str, Any], head_dim: int, given: int | None) -> int:
    """Rotated channels per head: stated in the file, or by the caller, never guessed."""
    stated = fields.get("rotary_dim")
    partial = rotary.get("partial_rotary_factor") or fields.get("partial_rotary_factor")
    if stated is None and partial is not None:
        stated = round(head_dim * partial)
    if stated is None and given is None:
        raise ValueError(
            f"config.json with head_dim={head_dim} does not say how many channels are rotated: MiniMax's "
            "weights were "
            f"trained with head_dim / 2 = {head_dim // 2}, the transformers class rotates all {head_dim}; "
            "pass "
            "rotary_dim"
        )
    if stated is not None and given is not None and stated != given:
        raise ValueError(
            f"rotary_dim={given} was asked for, config.json says {stated}: they must agree; drop yours or "
            "correct the file"
        )
    return int(stated if stated is not None else given)  # type: ignore[arg-type]


def _one_of_three(dialect: Dialect, fields: dict[str, Any], what: str) -> float:
    """The residual weight that lightning attention, softmax attention and experts must share."""
    names = [name.format(what) for name in _ALPHAS[dialect]]
    values = [float(_required(fields, name)) for name in names]
    if len(set(values)) > 1:
        raise ValueError(
            f"config.json has {', '.join(f'{n}={v}' for n, v in zip(names, values, strict=True))}: our "
            "layers have one "
            f"{what} for all three; such a model cannot be converted"
        )
    return values[0]
