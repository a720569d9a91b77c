"""The guard of a stage ends it, or only says so, as the policy of the run file has it; and knows which stages jump."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_m1.config import load_run
from megatron_m1.guard import JumpGuard
from megatron_m1.stages import stages_of
from megatron_m1.training.metrics import StepMetrics

RUN = """
preset: tiny
run_dir: {run_dir}
length_jump: {{answer: {answer}, patience_steps: 2, sigmas: {sigmas}}}
stages:
  - {{name: short, training: {{steps: 30, sequence_length: 128}}}}
  - {{name: same, training: {{steps: 30, sequence_length: 128}}}}
  - {{name: long, training: {{steps: 30, sequence_length: 256}}}}
"""


class Parts:
    """Gradient parts whose norms are set by hand."""

    names = ("lightning 0", "softmax 7")

    def __init__(self) -> None:
        self.value = 1.0

    def norms(self) -> list[float]:
        return [self.value, self.value]


class Told:
    """What a report was given."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.files: list[Path] = []

    def say(self, text: str) -> None:
        self.sentences.append(text)

    def keep(self, _step: int, file: Path) -> None:
        self.files.append(file)


def stages(tmp_path: Path, answer: str = "insert", sigmas: float = 8.0):
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(run_dir=tmp_path / "run", answer=answer, sigmas=sigmas))
    return stages_of(load_run(path))


def take(guard: JumpGuard, parts: Parts, told: Told, first: int, norms: list[float]) -> list[bool]:
    ends = []
    for step, norm in enumerate(norms, first):
        parts.value = norm
        guard.measure()
        metrics = StepMetrics(
            step=step, loss_nats=1.0, learning_rate=1e-3, consumed_samples=step, consumed_tokens=step,
            step_time_s=1.0, tokens_per_s=1.0, grad_norm=norm, extra={"update_refused": 0},
        )  # fmt: skip
        ends.append(guard.saw(metrics, told))
    return ends


@pytest.mark.parametrize("answer", ["insert", "report"])
def test_an_explosion_ends_the_stage_unless_it_is_only_reported(answer: str, tmp_path: Path, alone) -> None:
    _, same, long = stages(tmp_path, answer)
    parts, told = Parts(), Told()
    before = JumpGuard(same, parts, None)
    assert not any(take(before, parts, told, 31, [1.0] * 20 + [500.0] * 4)), "rows of one length: no jump"
    guard = JumpGuard(long, parts, before.watch.state)
    assert (before.goes_back_to, guard.goes_back_to) == (None, 60)
    ends = take(guard, parts, told, 61, [1.0, 90.0, 90.0, 90.0])
    assert ends == [False, False, answer == "insert", answer == "insert"]
    assert told.files[0].name == "jump-step_00000063.png" and told.files[0].is_file()
    assert (guard.explosion is not None) == (answer == "insert")
    # a run that goes back says it there, once
    assert ["softmax 7 x 90" in text for text in told.sentences] == (
        [] if answer == "insert" else [False, True]
    )


def test_a_guard_that_is_off_needs_no_checkpoint_and_measures_nothing(tmp_path: Path, alone) -> None:
    _, _, long = stages(tmp_path, sigmas=0.0)
    parts, told = Parts(), Told()
    guard = JumpGuard(long, parts, None)
    assert guard.goes_back_to is None
    assert not any(take(guard, parts, told, 61, [1e9] * 9)) and not told.files
