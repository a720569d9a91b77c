"""The logical tensors of a state and of a checkpoint, and how one is filled from the other. No collective.

A state's tensors are megatron-core ShardedTensors: a key, a global shape and where this rank's piece lies in it. A
checkpoint's are the table `tensors.json`: the same, and where each stored piece lies (`parallel/pieces.py`). Nothing
unpickles: upstream's `.metadata` and `common.pt` are never read, and of a piece only its numbers are.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_outplace,
    extract_matching_values,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    apply_factory_merges,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess

from parallel import pieces
from parallel.manifest import CheckpointError, Manifest, check_files

TABLE_NAME = "tensors.json"


def extract_tensors(state: ShardedStateDict) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ShardedTensors of a state, factories applied, and the factories that put loaded pieces together
    again.

    Empty `_extra_state` objects (what layers without FP8 have) are left out.

    Raises:
        TypeError: another leaf that is not a tensor: it would have to be unpickled on load.
    """
    leaves, _, factories = load_preprocess(state)
    tensors, others = extract_matching_values(leaves, lambda leaf: isinstance(leaf, ShardedTensor))
    for leaf in nested_values(others):
        if not (
            isinstance(leaf, ShardedObject) and leaf.key.endswith("_extra_state") and _is_empty(leaf.data)
        ):
            raise TypeError(
                f"{leaf!r} is in the state of a checkpoint: only sharded tensors are stored, since an object would "
                "have to be unpickled on load; put plain values into `extra` and tensors into a ShardedTensor"
            )
    # copies, since a save and a load write into these objects; the data stay shared
    return dict_list_map_outplace(replace, tensors), factories


def _is_empty(value: Any) -> bool:
    if isinstance(value, io.BytesIO):
        return not value.getbuffer().nbytes
    return value is None or (torch.is_tensor(value) and not value.numel())


def read_table(directory: Path, manifest: Manifest | None = None) -> dict[str, Any]:
    """The tensor table of a checkpoint: key -> dtype, shape, pieces; as its manifest knows it, where one is given.

    Raises:
        CheckpointError: it is not the table that the manifest lists.
    """
    if manifest is not None:
        check_files(directory, [file for file in manifest.files if file.name == TABLE_NAME], hashed=True)
    return json.loads((directory / TABLE_NAME).read_bytes())


def leaves(tensors: dict[str, Any]) -> list[ShardedTensor]:
    """The ShardedTensors of a nested dict, in its order."""
    return list(nested_values(tensors))


def wanted_table(tensors: dict[str, Any]) -> dict[str, list[Any]]:
    """key -> dtype, global shape of the sharded tensors of this rank, as `logical_table` has them."""
    return {
        leaf.key: [str(leaf.dtype).removeprefix("torch."), list(leaf.global_shape)]
        for leaf in leaves(tensors)
    }


def check_fit(
    path: Path, stored: dict[str, list[Any]], wanted: dict[str, list[Any]], ignore: tuple[str, ...]
) -> None:
    """Refuse a checkpoint whose logical tensors are not the wanted ones; keys with an ignored prefix may be left.

    Raises:
        CheckpointError: naming the missing, the unexpected, and those of another dtype or shape.
    """
    unexpected = (
        key for key in sorted(stored.keys() - wanted.keys()) if not key.startswith(ignore or ("\0",))
    )
    problems = [
        *(f"{key} is not in it" for key in sorted(wanted.keys() - stored.keys())),
        *(f"{key} is in it and not in this model" for key in unexpected),
        *(
            f"{key} is {stored[key]} in it and {wanted[key]} here"
            for key in sorted(wanted.keys() & stored.keys())
            if wanted[key] != stored[key]
        ),
    ]
    if problems:
        shown = "; ".join(problems[:20]) + ("; ..." if len(problems) > 20 else "")
        raise CheckpointError(
            f"{path} does not fit this model, {len(problems)} tensors differ ({shown}): names, dtypes and global "
            "shapes must be equal; use the model and training sections of the run file that it was saved with"
        )


def logical_table(table: dict[str, Any]) -> dict[str, list[Any]]:
    """What of a tensor table does not depend on the layout: key -> dtype, global shape."""
    return {key: [entry["dtype"], entry["shape"]] for key, entry in table.items()}


def read_tensors(
    template: ShardedStateDict, directory: Path, table: dict[str, Any], *, verify: bool
) -> dict[str, Any]:
    """Fill a template; no collective. A leaf with data is filled in place, one without gets a new CPU tensor.

    Returns: the template's structure with plain tensors as leaves.

    Raises:
        CheckpointError: with `verify`, what is stored is not what was written.
    """
    tensors, factories = extract_tensors(template)
    parts = []
    for leaf in leaves(tensors):
        if leaf.data is None:
            leaf.init_data(torch.device("cpu"))
        parts += pieces.fill(leaf, table[leaf.key])
    pieces.read_all(parts, directory, verify=verify)
    return apply_factory_merges(dict_list_map_outplace(lambda leaf: leaf.data, tensors), factories)
