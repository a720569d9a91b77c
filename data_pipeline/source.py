"""One source of the run file: what it is, and the rows it gives.

`shard` is a prepared token shard, `chat` one with targets (`m1 data chat`), `synthetic` makes problems by rule. How
sources are mixed is `curriculum.py`; the section they stand in is `config.py`.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from data_pipeline.chat_shard import ChatShard
from data_pipeline.curriculum import Source
from data_pipeline.index import TokenShard
from data_pipeline.order import DocumentStream, Selection
from data_pipeline.pack import SplitDocuments
from data_pipeline.problems import Problems
from data_pipeline.synthetic import TASKS
from data_pipeline.tokenize import DocumentEncoder
from data_pipeline.whole import Packing, TooLong, WholeDocuments, WholeRule

Kind = Literal["shard", "chat", "synthetic"]
Bucket = Literal["all", "short", "medium", "long"]
# Fields that only some kinds have; the others leave them at their defaults.
KINDS_OF_FIELD: dict[str, tuple[Kind, ...]] = {
    "prefix": ("shard", "chat"),
    "max_epochs": ("shard", "chat"),
    "bucket": ("shard", "chat"),
    "packing": ("shard", "chat"),
    "too_long": ("shard", "chat"),
    "task": ("synthetic",),
    "length_tokens": ("synthetic",),
}
FINGERPRINT_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """One source and its share of the samples."""

    name: str = ""
    """What stages call it; without one, the prefix (with its bucket) or the task."""
    kind: Kind = "shard"
    """`shard`, `chat` or `synthetic`."""
    prefix: str = ""
    """Path of the shard without `.bin` and `.idx`; relative paths start at the working directory."""
    weight: float = 1.0
    """Share of the samples relative to the other sources' weights, above 0; a stage may set others."""
    max_epochs: int | None = None
    """How often each document is read at most, 0: without end. Then its weight goes to the others in proportion. None:
    what `m1 data prepare` noted beside the shard for its quality label, without end where it noted nothing.
    MiniMax-01 (arXiv 2501.08313, section 4.2) reads low-quality data twice and high-quality data four times."""
    bucket: Bucket = "all"
    """Documents of one length only: below `data.medium_from_tokens`, up to `data.long_above_tokens`, or above."""
    packing: Packing | None = None
    """`split`: documents are cut at row borders, nothing is padded. `greedy`, `best_fit`: documents stay whole.
    Without one, shards are split and chats are packed by best fit."""
    too_long: TooLong = "split"
    """For whole documents longer than a row: cut into rows, skipped in this stage, or a run that does not start."""
    task: str = ""
    """For `synthetic`: a task of `data_pipeline/synthetic.py`, as needles or key_value."""
    length_tokens: int = 0
    """For `synthetic`: tokens of each problem with its answer, 0: a whole row."""

    def __post_init__(self) -> None:
        for field in fields(self):
            kinds = KINDS_OF_FIELD.get(field.name)
            if kinds and self.kind not in kinds and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"data source '{self.title}' is of kind '{self.kind}' and has {field.name}="
                    f"{getattr(self, field.name)!r}: that belongs to {' and '.join(kinds)}; remove it"
                )
        if self.kind == "synthetic":
            if self.task not in TASKS:
                raise ValueError(
                    f"data source '{self.title}' has task='{self.task}': there are {', '.join(TASKS)}; choose one of "
                    "them"
                )
        elif not self.prefix or self.prefix.endswith((".bin", ".idx", ".loss")):
            raise ValueError(
                f"data source prefix='{self.prefix}' does not name a shard: a prefix is the path that "
                "PREFIX.bin and PREFIX.idx share; leave out the ending"
            )
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(
                f"weight={self.weight} of data source '{self.title}' is not a share: weights are finite and "
                "above 0; leave out a source instead of giving it weight 0"
            )
        for count in ("max_epochs", "length_tokens"):
            if (getattr(self, count) or 0) < 0:
                raise ValueError(
                    f"{count}={getattr(self, count)} of data source '{self.title}' is negative: it is at least 1, or 0 "
                    "for no bound; correct it"
                )

    @property
    def title(self) -> str:
        """The name, or what stands for it."""
        what = self.prefix or self.task
        return self.name or (what if self.bucket == "all" else f"{what}:{self.bucket}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRules:
    """What holds for all sources of a run."""

    medium_from_tokens: int
    long_above_tokens: int
    document_multiple: int
    encoder: Callable[[], DocumentEncoder]
    """Opens the tokenizer, which only synthetic sources need."""

    def selection(self, bucket: Bucket) -> Selection:
        """The documents of a bucket."""
        low = {"medium": self.medium_from_tokens, "long": self.long_above_tokens + 1}.get(bucket, 0)
        high = {"short": self.medium_from_tokens - 1, "medium": self.long_above_tokens}.get(bucket)
        return Selection(min_tokens=low, max_tokens=high, multiple=self.document_multiple)


def open_source(config: SourceConfig, rules: SourceRules, key: int) -> Source:
    """The source that a config describes; `key` (64 bits) chooses its order.

    Raises:
        ShardError: a shard is missing or damaged.
        ValueError: it gives nothing, or its tokenizer cannot be used.
    """
    if config.kind == "synthetic":
        return Problems(config.title, config.task, rules.encoder(), key, config.length_tokens)
    is_chat = config.kind == "chat"
    shard = open_shard(config)
    selection = rules.selection(config.bucket)
    packing = config.packing or ("best_fit" if is_chat else "split")
    if packing == "split":
        return SplitDocuments(config.title, DocumentStream(shard, key, selection), max_epochs_of(config))
    rule = WholeRule(packing=packing, too_long=config.too_long, max_epochs=max_epochs_of(config))
    return WholeDocuments(config.title, shard, key, rule, selection)


def max_epochs_of(config: SourceConfig) -> int:
    """Epochs that a shard may be read at most, 0: without end.

    Raises:
        ValueError: the note beside the shard cannot be read.
    """
    if config.max_epochs is not None:
        return config.max_epochs
    note = Path(f"{config.prefix}.json")
    try:
        return int(json.loads(note.read_text(encoding="utf-8")).get("max_epochs") or 0)
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{note} beside the shard of data source '{config.title}' is no summary of a preparation ({error}): "
            "prepare it again, or set the source's max_epochs (0: without end)"
        ) from error


def open_shard(config: SourceConfig) -> TokenShard:
    """The shard of a `shard` or `chat` source."""
    return ChatShard(config.prefix) if config.kind == "chat" else TokenShard(config.prefix)


def identity_of(config: SourceConfig) -> dict[str, Any]:
    """What the samples of a source depend on, without the place where it lies: JSON values."""
    values: dict[str, Any] = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name not in ("name", "prefix")
    }
    if config.kind == "synthetic":
        return values
    return values | {"max_epochs": max_epochs_of(config), "content": fingerprint(open_shard(config))}


def fingerprint(shard: TokenShard) -> str:
    """Documents, tokens and a hash over tokens at 64 places spread over the shard: another shard has another one.

    Reading all of a large shard would take minutes at every start; an edit between the places is not seen.
    """
    digest = hashlib.blake2b(digest_size=8)
    count = min(FINGERPRINT_TOKENS, shard.num_tokens)
    for place in range(FINGERPRINT_TOKENS):
        start = (shard.num_tokens - count) * place // (FINGERPRINT_TOKENS - 1)
        digest.update(shard.tokens(start, count).astype("<i4").tobytes())
    return f"{shard.num_documents} documents, {shard.num_tokens} tokens, {digest.hexdigest()}"
