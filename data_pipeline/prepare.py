"""The demo's data in one directory: corpus -> tokenizer.json -> train, held-out and chat shards -> summary.json.

Each part is made once. `parts.json` records, per finished part, the hash of what it was made from and the
hashes of its files; a part whose inputs and files still have these hashes is kept. Every file is written
under a temporary name and renamed, so a killed run is continued by running it again.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from data_pipeline.atomic import file_hash, only_process, write_whole
from data_pipeline.chat import prepare_chat
from data_pipeline.chat_shard import loss_path
from data_pipeline.chat_template import CONFIG_NAME
from data_pipeline.demo import Document, demo_documents, split_documents, unigram_entropy_nats_per_token
from data_pipeline.demo_chat import TEMPLATE, demo_conversations
from data_pipeline.index import ShardWriter, TokenShard, bin_path, idx_path
from data_pipeline.tokenize import END_OF_TEXT, DocumentEncoder, train_byte_level_bpe

VOCAB_SIZE = 4096
RECIPE_VERSION = 1
"""Raised when the same documents would give other files."""

Progress = Callable[[str, int, int], None]
"""Called with what is being made, how much is done and how much there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSummary:
    """What one shard holds."""

    prefix: str
    """Path of the shard without its endings."""
    num_documents: int
    """Documents in the shard."""
    num_bytes: int
    """UTF-8 bytes of their text."""
    num_tokens: int
    """Tokens, one end-of-text token per document included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSummary:
    """What `prepare_demo` left behind; summary.json holds all of it but `parts_reused`."""

    tokenizer_path: str
    """The tokenizer file."""
    vocab_size: int
    """Entries of its vocabulary."""
    train: SplitSummary
    """What is trained on."""
    held_out: SplitSummary
    """What is only evaluated."""
    num_conversations: dict[str, int]
    """By split: conversations in the shards chat_train and chat_held_out; no shard where there are none."""
    unigram_entropy_nats_per_token: float
    """Held-out loss of the training tokens' frequencies alone (add-one smoothing)."""
    parts_reused: tuple[str, ...]
    """Parts that were found finished."""


def prepare_demo(directory: Path, progress: Progress | None = None) -> DemoSummary:
    """Make the demo's tokenizer and shards in `directory`, or keep those that are finished.

    Args:
        directory: created when absent; receives tokenizer.json, tokenizer_config.json, train and held_out (.bin,
            .idx), chat_train and chat_held_out (.bin, .idx, .loss, and .jsonl to read), parts.json and summary.json.
        progress: told about each step as it happens.

    Raises:
        ValueError: this Python has no source files to read.
        OSError: the directory cannot be written.
    """
    report: Progress = progress or (lambda what, done, total: None)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with only_process(directory / "prepare.lock"):
        return _prepare_alone(directory, report)


def _prepare_alone(directory: Path, report: Progress) -> DemoSummary:
    report("corpus", 0, 1)
    splits = split_documents(demo_documents())
    report("corpus", 1, 1)
    parts = Parts(directory)
    tokenizer_path = make_tokenizer(parts, splits["train"], report)
    encoder = DocumentEncoder(tokenizer_path)
    summaries = {
        split: make_shard(parts, split, documents, encoder, report) for split, documents in splits.items()
    }
    num_conversations = {
        split: make_chat(parts, split, documents, tokenizer_path, report)
        for split, documents in splits.items()
    }
    tokens = {split: read_all_tokens(directory / split) for split in splits}
    summary = DemoSummary(
        tokenizer_path=str(tokenizer_path),
        vocab_size=encoder.vocab_size,
        train=summaries["train"],
        held_out=summaries["held_out"],
        num_conversations=num_conversations,
        unigram_entropy_nats_per_token=unigram_entropy_nats_per_token(
            tokens["train"], tokens["held_out"], encoder.vocab_size
        ),
        parts_reused=tuple(parts.reused),
    )
    # The file says what is there, not which run made it: a second run leaves it as it is.
    content = {name: value for name, value in asdict(summary).items() if name != "parts_reused"}
    write_whole(directory / "summary.json", json.dumps(content, indent=1).encode())
    return summary


class Parts:
    """The finished parts of a directory, by content hash."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.reused: list[str] = []
        self._path = directory / "parts.json"
        try:
            self._records = json.loads(self._path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            self._records = {}

    def make(self, name: str, inputs_hash: str, files: Sequence[Path], build: Callable[[], None]) -> None:
        """Call `build` to write `files`, unless they were made from the same inputs and are unchanged."""
        record = self._records.get(name)
        if record is not None and record == {"inputs": inputs_hash, "files": self._hashes(files)}:
            self.reused.append(name)
            return
        build()
        self._records[name] = {"inputs": inputs_hash, "files": self._hashes(files)}
        write_whole(self._path, json.dumps(self._records, indent=1).encode())

    def _hashes(self, files: Sequence[Path]) -> dict[str, str]:
        return {path.name: file_hash(path) for path in files if path.exists()}


def make_tokenizer(parts: Parts, documents: Sequence[Document], report: Progress) -> Path:
    """Train the tokenizer on the training documents and return its path."""
    path = parts.directory / "tokenizer.json"

    def build() -> None:
        train_byte_level_bpe((document.text for document in documents), VOCAB_SIZE, path)

    report("tokenizer", 0, 1)
    inputs_hash = hash_of("bpe", VOCAB_SIZE, version("tokenizers"), documents_hash(documents))
    parts.make("tokenizer", inputs_hash, [path], build)
    report("tokenizer", 1, 1)
    return path


def make_shard(
    parts: Parts, split: str, documents: Sequence[Document], encoder: DocumentEncoder, report: Progress
) -> SplitSummary:
    """Encode the documents of one split into its shard."""
    prefix = parts.directory / split

    def build() -> None:
        with ShardWriter(prefix, encoder.vocab_size) as writer:
            for number, tokens in enumerate(encoder.encode(document.text for document in documents)):
                report(f"{split} tokens", number, len(documents))
                writer.add_document(tokens)

    inputs_hash = hash_of("shard", file_hash(encoder.path), documents_hash(documents))
    parts.make(split, inputs_hash, [bin_path(prefix), idx_path(prefix)], build)
    report(f"{split} tokens", len(documents), len(documents))
    return SplitSummary(
        prefix=str(prefix),
        num_documents=len(documents),
        num_bytes=sum(len(document.text.encode()) for document in documents),
        num_tokens=TokenShard(prefix).num_tokens,
    )


def make_chat(
    parts: Parts, split: str, documents: Sequence[Document], tokenizer_path: Path, report: Progress
) -> int:
    """Make the conversations of one split and their shard; how many there are."""
    prefix = parts.directory / f"chat_{split}"
    lines = [json.dumps(talk) for talk in demo_conversations(documents)]
    if not lines:
        return 0
    text = prefix.with_suffix(".jsonl")
    settings = parts.directory / CONFIG_NAME

    def build() -> None:
        write_whole(settings, json.dumps({"eos_token": END_OF_TEXT, "chat_template": TEMPLATE}).encode())
        write_whole(text, "".join(f"{line}\n" for line in lines).encode())
        prepare_chat([text], prefix, parts.directory)

    report(f"chat {split}", 0, 1)
    inputs_hash = hash_of("chat", TEMPLATE, file_hash(tokenizer_path), *lines)
    files = [settings, text, bin_path(prefix), idx_path(prefix), loss_path(prefix)]
    parts.make(f"chat_{split}", inputs_hash, files, build)
    report(f"chat {split}", 1, 1)
    return len(lines)


def read_all_tokens(prefix: Path) -> np.ndarray:
    """All tokens of a shard: int32 [num_tokens]."""
    shard = TokenShard(prefix)
    return shard.tokens(0, shard.num_tokens)


def documents_hash(documents: Sequence[Document]) -> str:
    """A hash of the names and texts, in order."""
    digest = hashlib.sha256()
    for document in documents:
        for field in (document.name, document.text):
            content = field.encode()
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
    return digest.hexdigest()


def hash_of(*values: str | int) -> str:
    """A hash of what a part is made from, this recipe's version included."""
    return hashlib.sha256(json.dumps([RECIPE_VERSION, *values]).encode()).hexdigest()
