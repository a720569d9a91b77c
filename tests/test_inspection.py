"""`m1 data inspect`: what it shows is what the trainer reads, and its pictures are pictures."""

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from data_pipeline.index import ShardWriter
from data_pipeline.inspect import DOCUMENT_STYLES, MixOverTime, documents_in, mix_over_time, row_text
from data_pipeline.pack import RowBuilder
from data_pipeline.pictures import averaged, binary_count
from data_pipeline.tokenize import train_byte_level_bpe
from megatron_m1 import cli

RUN = """\
preset: tiny
name: shown
run_dir: {directory}/run
layout: {{tp: 1, pp: 1, ep: 1}}
training: {{steps: 10, sequence_length: 64, micro_batch_size: 1, evaluation_rows: 0}}
schedule: {{warmup_steps: 0, decay: none, decay_steps: 0, batch_ramp: [{{from_tokens: 0, global_batch_tokens: 640}}]}}
data:
  tokenizer_path: {directory}/tokenizer.json
  sources:
    - {{name: text, prefix: {directory}/text, max_epochs: 1}}
    - {{name: sums, kind: synthetic, task: arithmetic}}
  stages:
    - {{tokens: 1280, weights: {{text: 1}}}}
    - {{weights: {{text: 1, sums: 1}}, transition_tokens: 1280}}
"""


@pytest.fixture
def run_file(tmp_path):
    train_byte_level_bpe(
        ["Start with 9. Add 3. What is the result? Answer:"], 290, tmp_path / "tokenizer.json"
    )
    with ShardWriter(tmp_path / "text", 290) as writer:
        for number in range(60):
            writer.add_document(1 + (number + np.arange(40)) % 200)
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(directory=tmp_path))
    return path


def test_the_command_shows_rows_sources_and_pictures(run_file, tmp_path):
    arguments = [
        "data",
        "inspect",
        str(run_file),
        "--sample",
        "58",
        "--rows",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "sample 58 stage 1, source 'sums'" in text or "sample 58 stage 1, source 'text'" in text
    assert "dim: read, not learnt" in text
    # 20 rows of the first stage, and 17 of the 80 of the second: the source has 37 rows
    assert "source 'text' reaches its last epoch before sample" in text
    assert "text shard 2,400 100.0%" in text
    assert "sums synthetic made by rule 0.0%" in text
    for name in ("mix.png", "lengths.png"):
        with Image.open(tmp_path / "out" / name) as image:
            assert image.size[0] > 800
            assert len(set(image.convert("L").resize((60, 30)).tobytes())) > 3


def test_the_text_of_a_row_has_its_borders_colours_targets_and_padding():
    builder = RowBuilder(16)
    builder.add(np.arange(65, 70), np.array([0, 0, 1, 1]), 5, 6)
    builder.add(np.array([97, 27, 99, 100, 101, 102, 103]), 1.0, 7, 7)
    row = builder.finish(3)
    assert [(part.start, part.num_tokens, part.positions) for part in documents_in(row)] == [
        (0, 5, 6),
        (6, 7, 7),
        (13, 0, 3),
    ]
    text = row_text(row, lambda tokens: "".join(map(chr, tokens)), tokens_shown=5)
    # ESC would be read by the terminal; of the second document only the ends are shown
    assert text.plain == "\u25035\u2503ABCDE[1 padding]\u25037\u2503a\ufffd \u2026 fg\u25030\u2503[3 padding]"
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["ABC"] == f"dim {DOCUMENT_STYLES[0]}"
    assert styles["DE"] == DOCUMENT_STYLES[0]
    assert styles["a"] == f"dim {DOCUMENT_STYLES[1]}"
    assert styles["fg"] == DOCUMENT_STYLES[1]
    Console(file=open("/dev/null", "w")).print(text)  # noqa: SIM115


def test_the_mix_over_time_is_what_the_samples_are(run_file):
    from data_pipeline.config import build_dataset
    from megatron_m1.config import load_run

    config = load_run(run_file)
    dataset = build_dataset(config.data, 64, config.seed, "train")
    mix = mix_over_time(dataset, 100)
    assert mix.names == ("text", "sums")
    assert mix.tokens_N[-1] == 6400
    assert mix.stage_tokens == (0, 1280)
    for number, (start, end) in enumerate(zip(mix.tokens_N, mix.tokens_N[1:], strict=False)):
        samples = range(int(start) // 64, int(end) // 64)
        share = np.mean([dataset.locate(sample).source for sample in samples])
        assert share == pytest.approx(mix.shares_NK[number, 1], abs=1 / len(samples))


def test_the_pictures_mix_is_a_mean_over_windows_that_end_with_the_stages():
    # one stage of 30 tokens, then 70 in which the pieces take turns
    mix = MixOverTime(
        names=("one", "other"),
        tokens_N=np.array([0.0, 30, 40, 50, 60, 100]),
        shares_NK=np.array([[1.0, 0], [0, 1], [1, 0], [0, 1], [0.5, 0.5]]),
        stage_tokens=(0.0, 30.0),
    )
    tokens_M, shares_MK = averaged(mix, 4)
    assert tokens_M.tolist() == [0, 25, 30, 50, 75, 100]
    np.testing.assert_allclose(shares_MK[:, 0], [1, 1, 0.5, 7.5 / 25, 0.5])
    np.testing.assert_allclose(shares_MK.sum(1), 1)
    assert [binary_count(tokens) for tokens in (512.0, 1024.0, 2.0**15, 2.0**20)] == [
        "512",
        "1K",
        "32K",
        "1M",
    ]
