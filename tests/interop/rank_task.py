"""What one rank does in test_layouts.py; apart from it, so that ranks do not import the transformers library."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_m1.interop.config_json import read_config
from megatron_m1.interop.huggingface import Export, export_weights, import_weights
from megatron_m1.model.hybrid import HybridModel, build_model
from megatron_m1.model.packed import Packed
from parallel.groups import Groups, create_groups, destroy_groups
from parallel.layout import Layout

LENGTHS = [37, 1, 90]
ROTARY_DIM = 8


def tokens(vocab_size: int) -> torch.Tensor:
    """int64 [128], the same on every rank."""
    return torch.randint(vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(7))


def logits_and_export(source: str, layouts: list[Layout], target: str) -> list[torch.Tensor | None]:
    """Per layout: import, one forward pass, export; this rank's share of the logits (last stage only)."""
    results = []
    for number, layout in enumerate(layouts):
        groups = create_groups(layout, torch.device("cpu"))
        # megatron-core's embedding asks for this state under sequence parallelism, also without dropout
        model_parallel_cuda_manual_seed(1)
        config = read_config(Path(source), rotary_dim=ROTARY_DIM)
        chunks = build_model(dataclasses.replace(config, auxiliary_coefficient=0.0), groups, seed=None)
        import_weights(Path(source), chunks, groups)
        results.append(_forward(chunks, groups))
        options = Export(stored_as="fp32", shard_bytes=300_000, buffer_bytes=5000)
        export_weights(Path(target) / str(number), chunks, groups, options)
        destroy_groups()
    return results


@torch.no_grad()
def _forward(chunks: list[HybridModel], groups: Groups) -> torch.Tensor | None:
    """The pipeline by hand, one microbatch: blocking receives and sends around the ring of stages."""
    layout, model = groups.layout, chunks[0].model
    packed = Packed.from_lengths(
        LENGTHS, row_tokens=sum(LENGTHS), auxiliary_weight=1.0, device=torch.device("cpu")
    )
    tokens_here = sum(LENGTHS) // (layout.tp if layout.splits_tokens else 1)
    stage, pipeline = groups.coordinates["pp"], groups.collection.pp
    logits = None
    for chunk in chunks:
        if not chunk.pre_process:
            hidden = torch.empty(tokens_here, 1, model.hidden_size)
            dist.recv(hidden, group=pipeline, group_src=(stage - 1) % layout.pp)
            chunk.set_input_tensor(hidden)
        out = chunk(tokens(model.vocab_size), packed)
        if chunk.post_process:
            logits = out
        else:
            dist.send(out, group=pipeline, group_dst=(stage + 1) % layout.pp)
    return logits
