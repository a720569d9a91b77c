"""Preparation on a disk that is really full: a user's mistake that names the place, and goes on where there is room."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.tokenize import train_byte_level_bpe

ROOT = Path(__file__).parents[2]
NAMESPACE = ["unshare", "--mount", "--propagation", "private"]
PREPARE = """
import sys
from pathlib import Path
from data_pipeline.corpus import prepare_corpus
from data_pipeline.corpus_config import CorpusConfig, CorpusSource
source = CorpusSource(name="out", inputs=(sys.argv[1],))
config = CorpusConfig(sources=(source,), directory=sys.argv[2], tokenizer_path=sys.argv[3])
try:
    prepare_corpus(config)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_full_disk_is_named_with_what_to_do(tmp_path):
    if subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount: the full disk needs a small tmpfs")
    train_byte_level_bpe(["a"], 257, tmp_path / "tokenizer.json")
    letters = np.random.default_rng(0).integers(97, 123, 400_000, dtype=np.uint8).tobytes().decode()
    (tmp_path / "raw.jsonl").write_text(json.dumps({"text": letters}) + "\n")
    place = tmp_path / "small"
    place.mkdir()
    mounted = 'mount -t tmpfs -o size=128k tmpfs "$1"; shift; exec "$@"'
    arguments = [str(tmp_path / "raw.jsonl"), str(place), str(tmp_path / "tokenizer.json")]
    command = [*NAMESPACE, "sh", "-ec", mounted, "sh", str(place), sys.executable, "-c", PREPARE, *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    assert run.stdout.startswith(
        f"ValueError directory '{place}' cannot be written ([Errno 28] No space left"
    ), run.stdout + run.stderr
    assert "make room or name another place" in run.stdout
