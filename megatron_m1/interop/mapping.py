"""Which rows of a published MiniMax tensor are which rows of our logical tensors: pure data.

Our projections interleave what a head (or key/value group) needs, so that tensor parallelism cuts them at
head borders; published checkpoints keep the projections apart. Names and shapes: MiniMax-M1 modeling code
and its model.safetensors.index.json; the native transformers class saves the same names.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, product

from megatron_m1.model.config import ModelConfig

IGNORED_SUFFIXES = (".slope_rate", ".query_decay", ".key_decay", ".diagonal_decay")
"""Decay constants that the native transformers class saves beside its weights; we compute ours in fp64."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of whole rows of a published tensor and its place in a logical tensor."""

    first_row: int
    """Where the run begins in the published tensor."""
    num_rows: int
    key: str
    """Logical tensor, as `HybridModel.logical_tensors` names it."""
    lead: tuple[int, ...]
    """Leading indices in the logical tensor: expert, and gate or up; empty for a plain matrix."""
    logical_row: int
    """Where the run begins on the logical axis after `lead`."""


@dataclass(frozen=True, slots=True)
class Published:
    """One tensor of a published checkpoint."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def is_router(self) -> bool:
        """Whether it is a router's weight: the only kind that is published in fp32."""
        return self.name.endswith("block_sparse_moe.gate.weight")


def published_tensors(model: ModelConfig) -> list[Published]:
    """Every tensor of a published checkpoint of this model, in the order of the layers."""
    tensors = [
        _whole("model.embed_tokens.weight", "embedding.word_embeddings.weight", _embedding_shape(model))
    ]
    for layer in range(model.num_layers):
        tensors += _layer(layer, model)
    tensors.append(_whole("model.norm.weight", "decoder.final_layernorm.weight", (model.hidden_size,)))
    tensors.append(_whole("lm_head.weight", "output_layer.weight", _embedding_shape(model)))
    return tensors


def check_partition(tensors: list[Published], logical: dict[str, tuple[int, ...]]) -> None:
    """Fail unless the pieces cover every published and every logical tensor exactly once.

    logical: key and global shape of every logical tensor of the model.
    """
    places: dict[tuple[str, tuple[int, ...]], list[tuple[int, int]]] = {}
    for tensor in tensors:
        rows = sorted((piece.first_row, piece.num_rows) for piece in tensor.pieces)
        assert _covers(rows, tensor.shape[0]), (
            f"pieces {rows} do not cover {tensor.name} of shape {tensor.shape}"
        )
        for piece in tensor.pieces:
            places.setdefault((piece.key, piece.lead), []).append((piece.logical_row, piece.num_rows))
    expected = {
        (key, lead): shape[num_lead]
        for key, shape in logical.items()
        for num_lead in [{4: 2, 3: 1}.get(len(shape), 0)]
        for lead in product(*map(range, shape[:num_lead]))
    }
    assert places.keys() == expected.keys(), (
        f"unmapped or unknown: {sorted(places.keys() ^ expected.keys())[:8]}"
    )
    for place, runs in places.items():
        assert _covers(sorted(runs), expected[place]), (
            f"rows {sorted(runs)} do not cover {place} exactly once"
        )


def _covers(runs: list[tuple[int, int]], num_rows: int) -> bool:
    borders = [0, *accumulate(count for _, count in runs)]
    return [start for start, _ in runs] == borders[:-1] and borders[-1] == num_rows


def _embedding_shape(model: ModelConfig) -> tuple[int, int]:
    return model.vocab_size, model.hidden_size


def _whole(name: str, key: str, shape: tuple[int, ...], lead: tuple[int, ...] = ()) -> Published:
    return Published(name, shape, (Piece(0, shape[0], key, lead, 0),))


def _layer(layer: int, model: ModelConfig) -> list[Published]:
    theirs, ours, width = f"model.layers.{layer}.", f"decoder.layers.{layer}.", model.hidden_size
    attention = {"lightning": _lightning, "softmax": _softmax}[model.layer_kinds[layer]]
    return [
        _whole(f"{theirs}input_layernorm.weight", f"{ours}attention_norm.weight", (width,)),
        *attention(f"{theirs}self_attn.", f"{ours}attention.", model),
        _whole(f"{theirs}post_attention_layernorm.weight", f"{ours}moe_norm.weight", (width,)),
        *_experts(f"{theirs}block_sparse_moe.", f"{ours}moe.", model),
    ]


def _lightning(theirs: str, ours: str, model: ModelConfig) -> list[Published]:
    """qkv_proj is [q | k | v] per head, output_gate the gate per head; ours is all four per head."""
    rows, channels, width = model.head_dim, model.num_heads * model.head_dim, model.hidden_size
    key, heads = f"{ours}linear_qkvg.weight", range(model.num_heads)
    qkv = tuple(Piece(3 * rows * head, 3 * rows, key, (), 4 * rows * head) for head in heads)
    gate = tuple(Piece(rows * head, rows, key, (), 4 * rows * head + 3 * rows) for head in heads)
    return [
        Published(f"{theirs}qkv_proj.weight", (3 * channels, width), qkv),
        Published(f"{theirs}output_gate.weight", (channels, width), gate),
        _whole(f"{theirs}norm.weight", f"{ours}norm.weight", (channels,)),
        _whole(f"{theirs}out_proj.weight", f"{ours}linear_out.weight", (width, channels)),
    ]


def _softmax(theirs: str, ours: str, model: ModelConfig) -> list[Published]:
    """q_proj, k_proj and v_proj are apart; ours is [queries | key | value] per key/value group."""
    rows, groups, width = model.head_dim, model.num_kv_heads, model.hidden_size
    queries = model.num_heads // groups
    key, group_rows = f"{ours}linear_qkv.weight", (queries + 2) * rows

    def projection(name: str, heads: int, heads_before: int) -> Published:
        pieces = tuple(
            Piece(heads * rows * group, heads * rows, key, (), group_rows * group + heads_before * rows)
            for group in range(groups)
        )
        return Published(f"{theirs}{name}.weight", (heads * rows * groups, width), pieces)

    return [
        projection("q_proj", queries, 0),
        projection("k_proj", 1, queries),
        projection("v_proj", 1, queries + 1),
        _whole(f"{theirs}o_proj.weight", f"{ours}linear_out.weight", (width, model.num_heads * rows)),
    ]


def _experts(theirs: str, ours: str, model: ModelConfig) -> list[Published]:
    """w1 is the gate, w3 the up projection, w2 the down projection of each expert."""
    tall, wide = (model.ffn_size, model.hidden_size), (model.hidden_size, model.ffn_size)
    tensors = [_whole(f"{theirs}gate.weight", f"{ours}router.weight", (model.num_experts, model.hidden_size))]
    for expert in range(model.num_experts):
        name = f"{theirs}experts.{expert}"
        tensors.append(_whole(f"{name}.w1.weight", f"{ours}experts.gate_up", tall, (expert, 0)))
        tensors.append(_whole(f"{name}.w2.weight", f"{ours}experts.down", wide, (expert,)))
        tensors.append(_whole(f"{name}.w3.weight", f"{ours}experts.gate_up", tall, (expert, 1)))
    return tensors
