"""Every alarm that the code can give stands in the runbook, in the words in which a user meets it."""

from __future__ import annotations

import ast
import re

import pytest

from megatron_m1.launch.script import BODY
from tests.house.checkout import ROOT

RUNBOOK = (ROOT / "slurm" / "README.md").read_text(encoding="utf-8").partition("## Runbook")[2]
# what a run says while it trains; rewards and judges have readers of their own
SOURCES = sorted(
    path
    for pattern in (
        "megatron_m1/*.py",
        "megatron_m1/training/*.py",
        "megatron_m1/launch/*.py",
        "parallel/*.py",
    )
    for path in ROOT.glob(pattern)
)
_PLACEHOLDER = re.compile(r"%[-+.\d]*[sdrfg]|%\.0f%%")


def warnings_in(source: str) -> list[str]:
    """The texts of all warnings and errors that a file logs."""
    found = []
    for node in ast.walk(ast.parse(source)):
        is_log = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if (
            is_log
            and node.func.attr in ("warning", "error")
            and getattr(node.func.value, "id", "")
            in (
                "_LOG",
                "logger",
            )
        ):
            assert isinstance(node.args[0], ast.Constant), ast.dump(node)
            found.append(node.args[0].value)
    return found


def is_there(text: str, split: re.Pattern[str]) -> bool:
    """Whether one of the fixed parts of a message, of three words or more (or all of it), is in the runbook."""
    parts = [part.strip(" :;,.()") for part in split.split(text)]
    return any(piece in RUNBOOK for part in parts for piece in pieces_of(part))


def pieces_of(part: str) -> list[str]:
    words = part.split()
    if len(words) <= 3:
        return [part] if part else []
    return [" ".join(words[start : start + 3]) for start in range(len(words) - 2)]


LOGGED = [(path.name, text) for path in SOURCES for text in warnings_in(path.read_text(encoding="utf-8"))]


def test_alarms_are_found() -> None:
    assert len(LOGGED) > 10


@pytest.mark.parametrize(("file", "text"), LOGGED, ids=[text[:40] for _, text in LOGGED])
def test_what_is_logged_is_explained(file: str, text: str) -> None:
    assert is_there(text, _PLACEHOLDER), f"{file}: {text!r} is not in the runbook"


def test_what_ends_a_job_is_explained() -> None:
    reasons = re.findall(r'(?:give_up|queue_again) "([^"]+)', BODY.read_text())
    assert len(reasons) >= 3
    for reason in (one for one in reasons if not one.startswith("$(<")):
        assert is_there(reason, re.compile(r"\$\w+|\$")) or reason.startswith("$why"), reason


def test_every_measured_number_that_is_an_alarm_is_explained() -> None:
    vitals = (ROOT / "megatron_m1" / "vitals.py").read_text()
    training = [(ROOT / "megatron_m1" / "training" / name).read_text() for name in ("loop.py", "step.py")]
    survey = next(
        node
        for node in ast.walk(ast.parse(vitals))
        if isinstance(node, ast.FunctionDef) and node.name == "_survey"
    )
    names = {key.value for node in ast.walk(survey) if isinstance(node, ast.Dict) for key in node.keys if key}
    names |= {"checkpoint_age_s", "dropped_share", "busiest_expert_over_mean", "busiest_ep_rank_over_mean"}
    names |= {"busiest_ep_rank_tokens", "update_refused"}
    assert len(names) >= 11
    for name in names:
        assert f'"{name}"' in "".join([vitals, *training]), f"{name} is measured nowhere"
        assert name in RUNBOOK, f"{name} is not in the runbook"


@pytest.mark.parametrize(
    "word", ["HANG:", "bad node", "BrokenRun", "CheckpointError", "ArrivalError", "TIMEOUT", "NODE_FAIL"]
)
def test_what_ends_a_run_is_explained(word: str) -> None:
    assert word in RUNBOOK
