"""Weights imported into any layout give the logits of one process, and leave any layout as the same bytes."""

from __future__ import annotations

import pytest
import torch

from parallel.layout import Layout
from tests.interop import native
from tests.interop.rank_task import LENGTHS, ROTARY_DIM, logits_and_export, tokens
from tests.interop.test_huggingface import all_tensors, assert_same_bytes
from tests.spawn import run_ranks

LAYOUTS = {
    2: [
        Layout(tp=2),
        Layout(tp=2, sequence_parallel=False),
        Layout(tp=2, etp=2),
        Layout(pp=2),
        Layout(pp=2, vpp=2),
        Layout(ep=2, dp=2),
    ],
    4: [Layout(tp=2, pp=2, ep=2), Layout(tp=2, dp=2, ep=4), Layout(tp=2, dp=2, ep=2, etp=2)],
}


@pytest.mark.multiprocess
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_imported_logits_and_exported_bytes_do_not_depend_on_the_layout(world_size, tmp_path, monkeypatch):
    source, target, layouts = tmp_path / "in", tmp_path / "out", LAYOUTS[world_size]
    oracle = native.native_model()
    oracle.save_pretrained(source)
    native.repair_rotary(oracle, ROTARY_DIM, monkeypatch.setattr)
    with torch.no_grad():
        expected = native.logits_one_by_one(oracle, list(tokens(native.VOCAB_SIZE).split(LENGTHS)))
    by_rank = run_ranks(world_size, logits_and_export, str(source), layouts, str(target))
    for number, layout in enumerate(layouts):
        places = [layout.coordinates(rank) for rank in range(world_size)]
        last_stage = [rank for rank in range(world_size) if places[rank]["pp"] == layout.pp - 1]
        for dp in range(layout.dp):
            shares = [by_rank[rank][number] for rank in last_stage if places[rank]["dp"] == dp]
            gap = (torch.cat(shares, dim=-1) - expected).abs().max()
            assert gap < 1e-4, f"{layout}: logits differ by {gap}"
        assert_same_bytes(all_tensors(target / str(number)), all_tensors(source))
