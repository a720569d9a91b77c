"""What a run reads: sources with weights, held-out sources, tokenizer; and the dataset built from that.

The order of samples depends on the shards, the weights, the sequence length and the seed, not on the paths
and not on how many processes read.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.index import TokenShard
from data_pipeline.mix import BlendedDataset, BlendSchedule
from data_pipeline.pack import PackedShard
from data_pipeline.permute import derive_key

Split = Literal["train", "held_out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """One token shard and its share of the samples."""

    prefix: str
    """Path of the shard without `.bin` and `.idx`; relative paths start at the working directory."""
    weight: float = 1.0
    """Share of the samples relative to the other sources' weights, above 0."""

    def __post_init__(self) -> None:
        if not self.prefix or self.prefix.endswith((".bin", ".idx")):
            raise ValueError(
                f"data source prefix='{self.prefix}' does not name a shard: a prefix is the path that "
                "PREFIX.bin and PREFIX.idx share; leave out the ending"
            )
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(
                f"weight={self.weight} of data source '{self.prefix}' is not a share: weights are finite and "
                "above 0; leave out a source instead of giving it weight 0"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The data of a run. The defaults are the demo corpus."""

    sources: tuple[SourceConfig, ...] = (SourceConfig(prefix="data/demo/train"),)
    """Shards to train on, blended by weight."""
    held_out: tuple[SourceConfig, ...] = (SourceConfig(prefix="data/demo/held_out"),)
    """Shards that are only evaluated, never trained on."""
    tokenizer_path: str = "data/demo/tokenizer.json"
    """The tokenizer that encoded the shards."""
    prefetch_steps: int = 4
    """Steps whose samples are read ahead, in steps; memory is this many times one step's tokens."""

    def __post_init__(self) -> None:
        for split, sources in (("sources", self.sources), ("held_out", self.held_out)):
            prefixes = [source.prefix for source in sources]
            if not prefixes or len(set(prefixes)) < len(prefixes):
                raise ValueError(
                    f"data.{split}={prefixes} is not a blend: it names at least 1 shard and none twice; "
                    "give a shard one entry with the sum of its weights"
                )
        trained_on = {source.prefix for source in self.sources}
        both = sorted(source.prefix for source in self.held_out if source.prefix in trained_on)
        if both:
            raise ValueError(
                f"data.held_out={both} is also trained on: a held-out shard is not among data.sources; "
                "remove it from one of the two"
            )
        if self.prefetch_steps < 1:
            raise ValueError(
                f"data.prefetch_steps={self.prefetch_steps} reads nothing ahead: it is at least 1 step; "
                "set it to 1 or more"
            )


def build_dataset(config: DataConfig, sequence_length: int, seed: int, split: Split) -> BlendedDataset:
    """The random-access dataset of one split: `dataset[i]` is global sample i of `sequence_length` tokens.

    Raises:
        ShardError: a shard is missing or damaged.
        ValueError: an unknown split, an empty shard, or a sequence length below 1.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split='{split}' is unknown: there are 'train' and 'held_out'; choose one of them")
    chosen = config.sources if split == "train" else config.held_out
    keys = [derive_key(seed, split, "source", number) for number in range(len(chosen))]
    packed = [
        PackedShard(TokenShard(Path(source.prefix)), sequence_length, key)
        for source, key in zip(chosen, keys, strict=True)
    ]
    schedule = BlendSchedule([source.weight for source in chosen], derive_key(seed, split, "blend"))
    return BlendedDataset(packed, schedule)
