"""The demo corpus: real text that is on every machine with Python, split into train and held-out.

One document per topic of Python's built-in documentation and per source file of its standard library.
Nothing is fetched; another Python version gives a slightly different corpus, the same one the same.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

MIN_CORPUS_BYTES = 10_000_000
HELD_OUT_SHARE = 0.03
SKIPPED_DIRECTORIES = frozenset(
    {"__pycache__", "dist-packages", "idle_test", "pydoc_data", "site-packages", "test", "tests"}
)
# Written when Python is built: paths of the build machine, not text.
SKIPPED_PREFIX = "_sysconfigdata"


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One document of the corpus."""

    name: str
    """Where it is from: `topic:assert`, `stdlib:json/decoder.py`; it decides the split."""
    text: str
    """Its whole text."""


def demo_documents(stdlib: Path | None = None) -> list[Document]:
    """The corpus, topics first, each part sorted by name.

    Args:
        stdlib: the standard library's directory; the running Python's by default.

    Raises:
        ValueError: this Python has less than 10 MB of text, as when its sources were left out.
    """
    stdlib = stdlib or Path(sysconfig.get_path("stdlib"))
    documents = [Document(name=f"topic:{name}", text=text) for name, text in sorted(topics.items())]
    documents += stdlib_documents(stdlib)
    num_bytes = sum(len(document.text.encode()) for document in documents)
    if num_bytes < MIN_CORPUS_BYTES:
        raise ValueError(
            f"the standard library at '{stdlib}' gives a corpus of {num_bytes} bytes: the demo needs at "
            f"least {MIN_CORPUS_BYTES}; use a Python that was installed with its source files"
        )
    return documents


def stdlib_documents(stdlib: Path) -> Iterator[Document]:
    """The source files under `stdlib` in path order; no tests, installed packages or links, only UTF-8."""
    paths = []
    for directory, subdirectories, names in os.walk(stdlib):
        subdirectories[:] = [name for name in subdirectories if name not in SKIPPED_DIRECTORIES]
        kept = [name for name in names if name.endswith(".py") and not name.startswith(SKIPPED_PREFIX)]
        paths += [Path(directory, name) for name in kept]
    for path in sorted(paths, key=lambda path: path.relative_to(stdlib).as_posix()):
        if path.is_symlink():
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield Document(name=f"stdlib:{path.relative_to(stdlib).as_posix()}", text=text)


def is_held_out(name: str, share: float = HELD_OUT_SHARE) -> bool:
    """Whether a document is kept from training: by a hash of its name, so other documents cannot move it."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def split_documents(documents: Sequence[Document]) -> dict[str, list[Document]]:
    """The documents of `train` and of `held_out`, in order."""
    return {
        "train": [document for document in documents if not is_held_out(document.name)],
        "held_out": [document for document in documents if is_held_out(document.name)],
    }


def unigram_entropy_nats_per_token(
    train_tokens_S: np.ndarray, held_out_tokens_S: np.ndarray, vocab_size: int
) -> float:
    """Mean of -ln p(token) over the held-out tokens, p counted on the training tokens plus one per entry.

    This is the loss of a model that knows how frequent each token is and nothing else.

    Args:
        train_tokens_S, held_out_tokens_S: integer [any], ids in [0, vocab_size).
        vocab_size: entries of the vocabulary.
    """
    counts_P = np.bincount(train_tokens_S, minlength=vocab_size) + 1.0
    nats_P = np.log(counts_P.sum()) - np.log(counts_P)
    return float(nats_P[held_out_tokens_S].mean())
