"""config.json in both dialects becomes our ModelConfig and back; what our model lacks is refused by name."""

from __future__ import annotations

import json

import pytest

from megatron_m1.interop.config_json import json_from_model, model_from_json, read_config
from megatron_m1.model.config import ModelConfig

# the numbers of the published config.json of MiniMax-M1-80k, typed from it
RELEASED_M1 = {
    "architectures": ["MiniMaxM1ForCausalLM"],
    "model_type": "minimax_m1",
    "attn_type_list": ([0] * 7 + [1]) * 10,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 6144,
    "intermediate_size": 9216,
    "num_local_experts": 32,
    "num_experts_per_tok": 2,
    "vocab_size": 200064,
    "rope_theta": 10000000,
    "rotary_dim": 64,
    "rms_norm_eps": 1e-05,
    "layernorm_linear_attention_alpha": 3.5565588200778455,
    "layernorm_full_attention_alpha": 3.5565588200778455,
    "layernorm_mlp_alpha": 3.5565588200778455,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_mlp_beta": 1.0,
    "max_position_embeddings": 10240000,
    "postnorm": True,
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "router_jitter_noise": 0.0,
    "router_aux_loss_coef": 0.001,
    "output_router_logits": False,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "transformers_version": "4.45.2",
    "use_cache": True,
}
NATIVE = {
    "model_type": "minimax",
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": None,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 96,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6},
    "rms_norm_eps": 1e-6,
    **{f"{part}_alpha_factor": 2.0 for part in ("full_attn", "linear_attn", "mlp")},
    **{f"{part}_beta_factor": 0.5 for part in ("full_attn", "linear_attn", "mlp")},
}


def test_the_published_config_of_m1_is_read():
    model = model_from_json(RELEASED_M1)
    assert (model.num_layers, model.softmax_every, model.hidden_size, model.vocab_size) == (
        80,
        8,
        6144,
        200064,
    )
    assert (model.num_heads, model.num_kv_heads, model.head_dim, model.rotary_dim) == (64, 8, 128, 64)
    assert (model.num_experts, model.experts_per_token, model.ffn_size) == (32, 2, 9216)
    assert (model.rotary_base, model.norm_eps, model.lightning_norm_eps) == (1e7, 1e-5, 1e-6)
    assert (model.alpha, model.residual_beta) == (3.5565588200778455, 1.0)
    # DeepNorm's rule gives the published number
    assert ModelConfig(num_layers=80).alpha == pytest.approx(model.alpha, rel=1e-15)


def test_a_released_config_survives_the_way_there_and_back():
    written = json_from_model(model_from_json(RELEASED_M1), "released", max_position_embeddings=10240000)
    assert {name: RELEASED_M1[name] for name in written} == written
    assert model_from_json(json.loads(json.dumps(written))) == model_from_json(RELEASED_M1)


def test_a_native_config_is_read_and_survives():
    model = model_from_json(NATIVE, rotary_dim=8)
    assert (model.head_dim, model.softmax_every, model.rotary_base, model.norm_eps) == (16, 2, 5e6, 1e-6)
    assert (model.alpha, model.residual_beta, model.rotary_dim) == (2.0, 0.5, 8)
    assert model_from_json(json_from_model(model, "native", max_position_embeddings=4096)) == model


@pytest.mark.parametrize(
    ("kinds", "every"), [([0] * 4, 5), ([1] * 4, 1), ([0, 1, 0, 1], 2), ([0, 0, 1, 0], 3)]
)
def test_layer_patterns_are_recognised(kinds, every):
    fields = RELEASED_M1 | {"num_hidden_layers": 4, "attn_type_list": kinds}
    assert model_from_json(fields).softmax_every == every


def test_rotary_dim_is_never_guessed():
    with pytest.raises(ValueError, match=r"head_dim=16 does not say.*head_dim / 2 = 8.*pass rotary_dim"):
        model_from_json(NATIVE)
    with pytest.raises(ValueError, match=r"rotary_dim=128 was asked for, config\.json says 64"):
        model_from_json(RELEASED_M1, rotary_dim=128)
    partial = NATIVE | {"rope_parameters": NATIVE["rope_parameters"] | {"partial_rotary_factor": 0.5}}
    assert model_from_json(partial).rotary_dim == 8


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"layernorm_mlp_alpha": 3.0}, "layernorm_mlp_alpha=3.0: our layers have one alpha"),
        ({"layernorm_mlp_beta": 0.5}, "our layers have one beta"),
        ({"shared_intermediate_size": 1024}, "shared_intermediate_size=1024: it must be 0"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"attention_bias": True}, "attention_bias=True.*without biases"),
        ({"quantization_config": {"bits": 8}}, "quantization_config=.*unquantised"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': it must be 'silu'"),
        ({"postnorm": False}, "postnorm=False"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling=.*unscaled"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"attn_type_list": [0, 1, 1, 0] * 20}, "attn_type_list=.*cannot be converted"),
        ({"attn_type_list": [0, 1]}, "attn_type_list=.*num_hidden_layers=80"),
        ({"rms_norm_eps": None}, "lacks rms_norm_eps.*no default is assumed"),
        ({"vocab_size": None}, "lacks vocab_size"),
    ],
)
def test_what_our_model_lacks_is_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        model_from_json(RELEASED_M1 | change)


def test_a_config_of_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model_type='llama' names no layer pattern"):
        model_from_json({"model_type": "llama"})
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        read_config(tmp_path)


def test_the_native_class_is_refused_heads_that_it_decays_differently():
    with pytest.raises(ValueError, match=r"num_attention_heads=6 .*power of two.*released dialect"):
        json_from_model(ModelConfig(num_heads=6, num_kv_heads=2), "native", max_position_embeddings=1)
    json_from_model(ModelConfig(num_heads=6, num_kv_heads=2), "released", max_position_embeddings=1)
