"""The demo corpus: real text, enough of it, the same each time, split by name."""

import math

import numpy as np
import pytest

from data_pipeline.demo import (
    MIN_CORPUS_BYTES,
    demo_documents,
    is_held_out,
    split_documents,
    stdlib_documents,
    unigram_entropy_nats_per_token,
)


@pytest.fixture(scope="module")
def documents():
    return demo_documents()


def test_the_corpus_is_real_text_of_at_least_ten_megabytes(documents):
    assert sum(len(document.text.encode()) for document in documents) >= MIN_CORPUS_BYTES == 10_000_000
    text_of = {document.name: document.text for document in documents}
    assert "assert" in text_of["topic:assert"]
    assert "class JSONDecoder" in text_of["stdlib:json/decoder.py"]
    assert len(text_of) == len(documents) > 500


def test_the_corpus_is_the_same_each_time(documents):
    assert demo_documents() == documents
    names = [document.name for document in documents]
    num_topics = sum(name.startswith("topic:") for name in names)
    assert names[:num_topics] == sorted(names[:num_topics])


def test_about_three_percent_are_held_out_and_none_is_in_both(documents):
    splits = split_documents(documents)
    train, held_out = ({document.name for document in splits[split]} for split in ("train", "held_out"))
    assert train.isdisjoint(held_out)
    assert len(train) + len(held_out) == len(documents)
    assert 0.015 < len(held_out) / len(documents) < 0.045
    num_bytes = {split: sum(len(document.text) for document in splits[split]) for split in splits}
    assert num_bytes["held_out"] / num_bytes["train"] > 0.01


def test_a_document_keeps_its_split_whatever_else_there_is(documents):
    every_second = split_documents(documents[::2])
    for document in every_second["held_out"]:
        assert is_held_out(document.name)
    assert sum(is_held_out(f"name {number}") for number in range(100_000)) == pytest.approx(3000, abs=250)


def test_tests_packages_links_and_other_encodings_are_left_out(tmp_path):
    for name in ("b.py", "a/z.py", "a/test/x.py", "site-packages/x.py", "tests/x.py", "a/__pycache__/x.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    (tmp_path / "latin.py").write_bytes("# café".encode("latin-1"))
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "notes.txt").write_text("no source")
    (tmp_path / "_sysconfigdata_x.py").write_text("build_time_vars = {}")
    (tmp_path / "link.py").symlink_to(tmp_path / "b.py")
    (tmp_path / "windows.py").write_bytes(b"x = 1\r\n")
    documents = list(stdlib_documents(tmp_path))
    assert [document.name for document in documents] == ["stdlib:a/z.py", "stdlib:b.py", "stdlib:windows.py"]
    assert documents[-1].text == "x = 1\r\n"


def test_a_python_without_sources_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="the demo needs at least 10000000; use a Python that was installed with"
    ):
        demo_documents(tmp_path)


def test_unigram_entropy_by_hand():
    # Counts plus one: 3, 2, 1 of 6.
    train, held_out = np.array([0, 0, 1]), np.array([0, 1, 2, 2])
    expected = (math.log(6 / 3) + math.log(6 / 2) + 2 * math.log(6 / 1)) / 4
    assert unigram_entropy_nats_per_token(train, held_out, 3) == pytest.approx(expected, rel=1e-12)


def test_unigram_entropy_of_equally_frequent_tokens_is_the_log_of_the_vocabulary():
    tokens = np.tile(np.arange(64, dtype=np.uint16), 50)
    assert unigram_entropy_nats_per_token(tokens, tokens[:77], 64) == pytest.approx(math.log(64), rel=1e-12)
