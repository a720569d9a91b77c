"""A checkpoint that is not whole, or not this model's, is refused by name before anything moves."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_m1.interop.huggingface import Export, export_weights, import_weights
from megatron_m1.interop.ledger import Ledger
from megatron_m1.interop.mapping import check_partition, published_tensors
from megatron_m1.model.config import ModelConfig
from megatron_m1.model.hybrid import HybridModel, build_model

MODEL = ModelConfig(
    num_layers=2,
    softmax_every=2,
    hidden_size=16,
    num_heads=4,
    head_dim=8,
    rotary_dim=4,
    ffn_size=8,
    vocab_size=32,
)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {tensor.name: torch.randn(tensor.shape) for tensor in published_tensors(MODEL)}


@pytest.fixture
def model(alone) -> HybridModel:
    return build_model(MODEL, alone, seed=None)[0]


def load(tensors: dict[str, torch.Tensor], directory: Path, model: HybridModel, alone) -> Ledger:
    save_file(tensors, directory / "model.safetensors")
    return import_weights(directory, [model], alone)


def test_missing_tensor_is_named(tensors, model, alone, tmp_path):
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(ValueError, match=r"lacks 1 tensors \['model.layers.1.self_attn.k_proj.weight'\]"):
        load(tensors, tmp_path, model, alone)


def test_unknown_tensor_is_named(tensors, model, alone, tmp_path):
    tensors["model.layers.0.shared_mlp.up_proj.weight"] = torch.zeros(8, 16)
    with pytest.raises(ValueError, match=r"1 unknown ones \['model.layers.0.shared_mlp.up_proj.weight'\]"):
        load(tensors, tmp_path, model, alone)


def test_wrong_shape_is_named(tensors, model, alone, tmp_path):
    tensors["lm_head.weight"] = torch.zeros(33, 16)
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(33, 16\).*needs \(32, 16\)"):
        load(tensors, tmp_path, model, alone)


def test_quantised_tensor_is_refused(tensors, model, alone, tmp_path):
    tensors["lm_head.weight"] = torch.zeros(32, 16, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"lm_head.weight is stored as I8.*unquantised"):
        load(tensors, tmp_path, model, alone)


def test_truncated_file_is_named(tensors, model, alone, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read.*download it again"):
        import_weights(tmp_path, [model], alone)


def test_file_that_the_index_names_but_is_absent_is_named(tensors, model, alone, tmp_path):
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model-00001-of-00001.safetensors cannot be read"):
        import_weights(tmp_path, [model], alone)


def test_tensor_that_the_index_places_wrongly_is_named(tensors, model, alone, tmp_path):
    index = {"weight_map": dict.fromkeys([*tensors, "model.extra"], "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(tensors, tmp_path / "model-00001-of-00001.safetensors")
    with pytest.raises(
        ValueError, match=r"lacks 1 tensors that .*index.json places there, first model.extra"
    ):
        import_weights(tmp_path, [model], alone)


def test_directory_without_a_checkpoint_is_named(model, alone, tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        import_weights(tmp_path, [model], alone)


def test_export_into_a_used_directory_is_refused(model, alone, tmp_path):
    (tmp_path / "old.safetensors").touch()
    with pytest.raises(ValueError, match=r"already holds 1 files, first old.safetensors.*choose another"):
        export_weights(tmp_path, [model], alone)


def test_an_export_that_fails_leaves_no_file_under_a_final_name(model, alone, tmp_path, monkeypatch):
    def full(self, rows):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_m1.interop.huggingface.ShardWriter.append", full)
    with pytest.raises(OSError, match="No space left"):
        export_weights(tmp_path, [model], alone, Export(shard_bytes=4000))
    assert not list(tmp_path.glob("*.safetensors")) + list(tmp_path.glob("*.json"))


def logical_shapes(model: HybridModel) -> dict[str, tuple[int, ...]]:
    return {tensor.key: tuple(tensor.global_shape) for tensor in model.logical_tensors().values()}


def test_every_row_of_every_tensor_is_mapped_once(model):
    check_partition(published_tensors(MODEL), logical_shapes(model))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_rows": 8}, "do not cover"),
        ({"logical_row": 8}, "exactly once"),
        ({"key": "x"}, "unmapped or unknown"),
    ],
)
def test_a_mapping_that_loses_or_repeats_rows_is_caught(change, complaint, model):
    tensors = published_tensors(MODEL)
    place = next(i for i, tensor in enumerate(tensors) if "qkv_proj" in tensor.name)
    first, *others = tensors[place].pieces
    pieces = (dataclasses.replace(first, **change), *others)
    if "key" in change:
        pieces = tuple(dataclasses.replace(piece, **change) for piece in tensors[place].pieces)
    tensors[place] = dataclasses.replace(tensors[place], pieces=pieces)
    with pytest.raises(AssertionError, match=complaint):
        check_partition(tensors, logical_shapes(model))


@pytest.mark.parametrize(
    ("consumed", "written", "complaint"),
    [
        ({"a": 4}, {"b": 6}, "source a: 4 of 6"),
        ({"a": 6}, {"b": 12}, "target b: 12 of 6"),
        ({"a": 6, "c": 1}, {"b": 6}, "source c: 1 of 0"),
        ({}, {"b": 6}, "source a: 0 of 6"),
    ],
)
def test_ledger_that_does_not_add_up_names_the_tensor(consumed, written, complaint, alone):
    with pytest.raises(RuntimeError, match=complaint):
        Ledger(Counter(consumed), Counter(written)).settle({"a": 6}, {"b": 6})
