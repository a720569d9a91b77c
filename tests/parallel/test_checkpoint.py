"""A checkpoint gives back exactly what was saved, under the same layout and under any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.manifest import read_manifest
from tests.parallel import checkpoint_ranks as ranks
from tests.parallel.small_model import logical_parameters, logical_values
from tests.spawn import run_ranks

pytestmark = pytest.mark.multiprocess
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def four(directory: Path) -> dict[str, Any]:
    return run_ranks(4, ranks.layouts_of_four, str(directory))[0]


@pytest.fixture(scope="module")
def alone(directory: Path, four: dict[str, Any]) -> dict[str, Any]:
    return run_ranks(1, ranks.load_alone, str(directory))[0]


def differing(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    assert left.keys() == right.keys(), left.keys() ^ right.keys()
    return [key for key in left if not torch.equal(left[key], right[key])]


def adamw_by_hand(dtype: torch.dtype, steps: int) -> dict[str, torch.Tensor]:
    """Weights and state after `steps`, each whole tensor alone with torch's AdamW in fp32."""
    whole: dict[str, torch.Tensor] = {"optimizer.step": torch.tensor([steps])}
    for name, logical in logical_parameters(dtype).items():
        master = torch.nn.Parameter(logical_values(name, logical.shape, 0).to(logical.dtype).float())
        decay = 0.1 if len(logical.shape) >= 2 else 0.0
        adamw = torch.optim.AdamW(
            [master], lr=ranks.LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay
        )
        for step in range(1, steps + 1):
            master.grad = logical_values(name, logical.shape, step)
            adamw.step()
        whole[name] = master.detach().to(logical.dtype)
        whole[f"optimizer.exp_avg.{name}"] = adamw.state[master]["exp_avg"]
        whole[f"optimizer.exp_avg_sq.{name}"] = adamw.state[master]["exp_avg_sq"]
        if logical.dtype == torch.bfloat16:
            whole[f"optimizer.master.{name}"] = master.detach()
    return whole


@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_state_is_adamw_of_every_whole_tensor(four: dict[str, Any], dtype: str) -> None:
    assert differing(four[dtype]["saved"], adamw_by_hand(DTYPES[dtype], 3)) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_resume_in_the_same_layout_is_bit_equal_to_never_having_stopped(
    four: dict[str, Any], dtype: str
) -> None:
    found = four[dtype]
    assert found["steps"] == 3
    assert differing(found["loaded"], found["saved"]) == []
    assert differing(found["resumed"], found["straight"]) == []
    assert found["resumed norms"] == found["straight norms"]
    assert differing(found["resumed"], found["saved"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["tp4 pp1 dp1 ep2", "tp1 pp2 dp2 ep1", "tp1 pp1 dp4 ep4"])
def test_any_layout_of_four_ranks_loads_and_trains_on_exactly(
    four: dict[str, Any], dtype: str, layout: str
) -> None:
    assert differing(four[dtype][layout], four[dtype]["saved"]) == []
    assert differing(four[dtype][f"{layout} trained on"], four[dtype]["straight"]) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_process_loads_and_trains_on_exactly(
    four: dict[str, Any], alone: dict[str, Any], dtype: str
) -> None:
    assert differing(alone[dtype]["loaded"], four[dtype]["saved"]) == []
    assert differing(alone[dtype]["trained on"], four[dtype]["straight"]) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_megatron_core_reads_our_files(four: dict[str, Any], alone: dict[str, Any], dtype: str) -> None:
    assert differing(alone[dtype]["upstream"], four[dtype]["saved"]) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_before_the_first_step_saves_and_loads(four: dict[str, Any], dtype: str) -> None:
    found = four[dtype]
    assert not found["fresh"]["optimizer.exp_avg.embedding.weight"].any()
    assert differing(found["back to fresh"], found["fresh"]) == []
    assert differing(found["trained again"], found["saved"]) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_background_save_equals_foreground_save_though_training_went_on(
    four: dict[str, Any], directory: Path, dtype: str
) -> None:
    assert four[dtype]["published at once"] == []
    assert four[dtype]["published"] == 3
    now, behind = directory / dtype / "step_00000003", directory / f"{dtype}.async" / "step_00000003"
    tensors = [path.name for path in now.glob("*.distcp")]
    assert len(tensors) == 4
    for name in [*tensors, "tensors.json"]:
        assert (now / name).read_bytes() == (behind / name).read_bytes(), name
    assert read_manifest(now).extra == read_manifest(behind).extra


def test_extra_comes_back_as_it_was(four: dict[str, Any]) -> None:
    assert four["bf16"]["extra"] == {"position": 17, "text": "\u00e9"}


def test_every_rank_writes_about_the_same(four: dict[str, Any]) -> None:
    sizes = four["bf16"]["bytes by rank"]
    assert max(sizes) < 1.25 * sum(sizes) / len(sizes), sizes


def test_tensors_hash_is_the_model_and_not_the_layout(four: dict[str, Any], directory: Path) -> None:
    paths = [directory / dtype / "step_00000003" for dtype in DTYPES]
    bf16, fp32 = (read_manifest(path).tensors_sha256 for path in paths)
    fresh = read_manifest(directory / "bf16" / "step_00000000").tensors_sha256
    assert bf16 == fresh
    assert bf16 != fp32
