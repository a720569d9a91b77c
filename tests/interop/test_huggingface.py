"""The transformers library is the oracle: its weights in our model give its logits, gradients and files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels_cuda.lightning.decay import lightning_slopes
from megatron_m1.interop import huggingface
from megatron_m1.interop.config_json import read_config
from megatron_m1.interop.huggingface import Export, export_weights, import_weights
from megatron_m1.interop.mapping import IGNORED_SUFFIXES, published_tensors
from megatron_m1.model import lightning
from megatron_m1.model.config import ModelConfig
from megatron_m1.model.hybrid import HybridModel, build_model
from megatron_m1.model.norm import AllHeadsRMSNorm
from megatron_m1.model.packed import Packed
from tests.interop import native
from tests.interop.rank_task import ROTARY_DIM

LENGTHS = [70, 33, 1, 100]


@pytest.fixture
def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(native.VOCAB_SIZE, (length,), generator=generator) for length in LENGTHS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("native")
    native.native_model().save_pretrained(directory)
    return directory


def imported(directory: Path, alone, rotary_dim: int = ROTARY_DIM) -> HybridModel:
    config = dataclasses.replace(read_config(directory, rotary_dim=rotary_dim), auxiliary_coefficient=0.0)
    (model,) = build_model(config, alone, seed=None)
    import_weights(directory, [model], alone)
    return model


def pack(lengths: list[int]) -> Packed:
    return Packed.from_lengths(
        lengths, row_tokens=sum(lengths), auxiliary_weight=1.0, device=torch.device("cpu")
    )


def our_logits(model: HybridModel, documents: list[torch.Tensor]) -> torch.Tensor:
    return model(torch.cat(documents), pack([len(document) for document in documents]))


def published_view(logical: dict[str, torch.Tensor], model: ModelConfig) -> dict[str, torch.Tensor]:
    """Logical tensors cut and joined into published ones, through the importer's own mapping."""
    return {
        tensor.name: torch.cat(
            [logical[p.key][p.lead][p.logical_row : p.logical_row + p.num_rows] for p in tensor.pieces]
        )
        for tensor in published_tensors(model)
    }


@pytest.mark.parametrize("rotary_dim", [ROTARY_DIM, native.HEAD_DIM], ids=["partial_rotary", "unpatched"])
def test_logits_and_gradients_equal_transformers_for_packed_documents(
    rotary_dim, checkpoint, alone, documents, tmp_path, monkeypatch
):
    theirs, ours = native.native_model(), imported(checkpoint, alone, rotary_dim)
    if rotary_dim != native.HEAD_DIM:
        native.repair_rotary(theirs, rotary_dim, monkeypatch.setattr)
    expected, found = native.logits_one_by_one(theirs, documents), our_logits(ours, documents)
    assert expected.std() > 0.5
    assert (found - expected).abs().max() < 1e-4

    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(6))
    for logits in (expected, found):
        (logits * direction).sum().backward()
    logical = {tensor.key: tensor.data.grad for tensor in ours.logical_tensors().values()}
    gradients = published_view(logical, ours.model)
    of_theirs = native.published_gradients(theirs, tmp_path)
    assert gradients.keys() == {name for name in of_theirs if not name.endswith(IGNORED_SUFFIXES)}
    for name, gradient in gradients.items():
        scale = of_theirs[name].square().mean().sqrt()
        assert scale > 0, name
        error = (gradient - of_theirs[name]).square().mean().sqrt() / scale
        assert error < 1e-4, f"{name}: relative RMS error {error:.2e}"


def test_rotary_repair_changes_the_oracle(checkpoint, documents, monkeypatch):
    theirs = native.native_model()
    before = native.logits_one_by_one(theirs, documents)
    native.repair_rotary(theirs, ROTARY_DIM, monkeypatch.setattr)
    assert (native.logits_one_by_one(theirs, documents) - before).abs().max() > 0.1


def test_router_decisions_equal_transformers(checkpoint, alone, documents, monkeypatch):
    theirs, ours = native.native_model(), imported(checkpoint, alone)
    native.repair_rotary(theirs, ROTARY_DIM, monkeypatch.setattr)
    expected: dict[int, list[torch.Tensor]] = {}
    found: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(theirs.model.layers):

        def note_theirs(module, _inputs, output, index=index):
            expected.setdefault(index, []).append(
                torch.zeros(len(output[2]), 4).scatter(1, output[2], output[1])
            )

        layer.mlp.gate.register_forward_hook(note_theirs)
    for index, router in ours.routers():

        def note_ours(module, _inputs, output, index=index):
            found[index] = output[0]
            assert torch.equal(output[0] != 0, output[1])

        router.register_forward_hook(note_ours)
    with torch.no_grad():
        native.logits_one_by_one(theirs, documents)
        our_logits(ours, documents)
    for index in range(native.NUM_LAYERS):
        weights = torch.cat(expected[index])
        assert torch.equal(weights != 0, found[index] != 0), f"layer {index} routes differently"
        assert (weights - found[index]).abs().max() < 1e-5


def test_packed_documents_equal_the_same_documents_one_by_one(checkpoint, alone, documents):
    ours = imported(checkpoint, alone)
    with torch.no_grad():
        together = our_logits(ours, documents)
        apart = torch.cat([our_logits(ours, [document]) for document in documents])
    assert (together - apart).abs().max() < 2e-5


def swap_gate_and_up(monkeypatch) -> None:
    def swapped(model):
        names = {".w1.": ".w3.", ".w3.": ".w1."}
        return [
            dataclasses.replace(
                tensor,
                name=next(
                    (tensor.name.replace(*pair) for pair in names.items() if pair[0] in tensor.name),
                    tensor.name,
                ),
            )
            for tensor in published_tensors(model)
        ]

    monkeypatch.setattr(huggingface, "published_tensors", swapped)


def count_layers_from_one(monkeypatch) -> None:
    def shifted(num_heads, layer_index, num_layers):
        return lightning_slopes(num_heads, min(layer_index + 1, num_layers - 1), num_layers)

    monkeypatch.setattr(lightning, "lightning_slopes", shifted)


def normalise_each_head(monkeypatch) -> None:
    def per_head(self, x):
        heads = x.view(len(x), -1, native.HEAD_DIM)
        return (torch.nn.functional.rms_norm(heads, (native.HEAD_DIM,), eps=self.eps)).flatten(
            1
        ) * self.weight

    monkeypatch.setattr(AllHeadsRMSNorm, "forward", per_head)


@pytest.mark.parametrize("break_it", [swap_gate_and_up, count_layers_from_one, normalise_each_head])
def test_the_oracle_sees_a_wrong_model(break_it, checkpoint, alone, documents, monkeypatch):
    theirs = native.native_model()
    native.repair_rotary(theirs, ROTARY_DIM, monkeypatch.setattr)
    break_it(monkeypatch)
    ours = imported(checkpoint, alone)
    with torch.no_grad():
        gap = (our_logits(ours, documents) - native.logits_one_by_one(theirs, documents)).abs().max()
    assert gap > 1e-2


def assert_same_bytes(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    expected = {name: tensor for name, tensor in expected.items() if not name.endswith(IGNORED_SUFFIXES)}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def test_fp32_export_is_byte_equal_and_loads_into_transformers(checkpoint, alone, documents, tmp_path):
    ours = imported(checkpoint, alone)
    export = Export(dialect="native", stored_as="fp32", shard_bytes=200_000, max_position_embeddings=4096)
    ledger = export_weights(tmp_path / "out", [ours], alone, export)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert max(file.stat().st_size for file in files) < 210_000
    assert_same_bytes(all_tensors(tmp_path / "out"), load_file(checkpoint / "model.safetensors"))
    assert set(ledger.written) == {tensor.name for tensor in published_tensors(ours.model)}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in ours.parameters())
    theirs = native.MiniMaxForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    with torch.no_grad():
        gap = native.logits_one_by_one(theirs, documents) - native.logits_one_by_one(
            native.native_model(), documents
        )
    assert gap.abs().max() < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_released_form_round_trip_is_byte_equal(precision, checkpoint, alone, tmp_path):
    source = {
        name: tensor if name.endswith("gate.weight") and "moe" in name else tensor.bfloat16()
        for name, tensor in load_file(checkpoint / "model.safetensors").items()
        if not name.endswith(IGNORED_SUFFIXES)
    }
    (tmp_path / "in").mkdir()
    save_file(source, tmp_path / "in" / "model.safetensors")
    config = read_config(checkpoint, rotary_dim=ROTARY_DIM)
    (model,) = build_model(config, alone, precision=precision, seed=None)
    ledger = import_weights(tmp_path / "in", [model], alone)
    assert not ledger.rounded
    export_weights(tmp_path / "out", [model], alone)
    assert_same_bytes(all_tensors(tmp_path / "out"), source)
    assert read_config(tmp_path / "out") == config


def test_ledger_names_what_is_ignored_and_what_is_rounded(checkpoint, alone):
    config = read_config(checkpoint, rotary_dim=ROTARY_DIM)
    (model,) = build_model(config, alone, precision="bf16", seed=None)
    ledger = import_weights(checkpoint, [model], alone)
    assert len(ledger.ignored) == 4 * 7
    assert all(name.endswith(IGNORED_SUFFIXES) for name in ledger.ignored)
    kept_fp32 = {
        name for name in ledger.consumed if name.endswith(("block_sparse_moe.gate.weight", "lm_head.weight"))
    }
    assert ledger.rounded == set(ledger.consumed) - kept_fp32
    assert sum(ledger.consumed.values()) == sum(p.numel() for p in model.parameters())


def test_no_more_than_the_buffer_is_read_or_gathered_at_once(checkpoint, alone, tmp_path, monkeypatch):
    largest = {"read": 0, "written": 0}
    read, append = huggingface.ShardReader.read, huggingface.ShardWriter.append

    def noted_read(self, name, index):
        box = read(self, name, index)
        largest["read"] = max(largest["read"], box.nbytes)
        return box

    def noted_append(self, rows):
        largest["written"] = max(largest["written"], rows.nbytes)
        append(self, rows)

    monkeypatch.setattr(huggingface.ShardReader, "read", noted_read)
    monkeypatch.setattr(huggingface.ShardWriter, "append", noted_append)
    (model,) = build_model(read_config(checkpoint, rotary_dim=ROTARY_DIM), alone, seed=None)
    import_weights(checkpoint, [model], alone, buffer_bytes=1000)
    export_weights(tmp_path / "out", [model], alone, Export(stored_as="fp32", buffer_bytes=1000))
    assert 0 < largest["read"] <= 1000
    assert 0 < largest["written"] <= 1000
    assert_same_bytes(all_tensors(tmp_path / "out"), load_file(checkpoint / "model.safetensors"))
