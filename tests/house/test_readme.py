"""What the README and the other documents say is so: commands exist and run, links lead somewhere, one page."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from megatron_m1.cli import app
from megatron_m1.runfile import parse
from tests.house.checkout import ROOT, files

README = (ROOT / "README.md").read_text(encoding="utf-8")
MARKDOWN = [file for file in files() if file.suffix == ".md"]
# Cheap enough to run here; the others are checked to exist and are run by their own tests.
RUN_HERE = ("m1 doctor", "m1 train tiny --explain")


def fenced(language: str) -> list[str]:
    """Text of every fenced block of that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


COMMANDS = [line for block in fenced("bash") for line in block.splitlines() if line.strip()]


def test_the_readme_is_short():
    assert len(README.splitlines()) < 150


def test_the_readme_shows_the_two_commands_first():
    assert COMMANDS[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_every_make_target_exists(command):
    dry_run = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert dry_run.returncode == 0, dry_run.stderr


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith("make ")])
def test_every_other_command_is_an_m1_command(command):
    words = shlex.split(command)
    assert words[0] == "m1", f"{command!r} is no command of this project"
    verbs = words[1:3] if words[1] == "data" else words[1:2]
    done = CliRunner().invoke(app, [*verbs, "--help"])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("command", RUN_HERE)
def test_the_cheap_commands_run(command):
    assert command in COMMANDS
    words = [sys.executable, "-m", "megatron_m1", *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("m1 train")])
def test_the_runs_of_the_readme_are_legal(command):
    from megatron_m1.config import load_run

    words = [word for word in shlex.split(command)[2:] if not word.startswith("--")]
    assert load_run(words[0], words[1:]).name


def test_the_run_file_of_the_readme_is_legal(tmp_path):
    from megatron_m1.config import load_run

    (block,) = fenced("yaml")
    path = tmp_path / "run.yaml"
    path.write_text(block)
    config = load_run(path)
    assert config.layout.pp == parse(block, source="README")["layout"]["pp"]


@pytest.mark.parametrize("document", MARKDOWN, ids=str)
def test_every_relative_link_leads_to_a_file(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (ROOT / document).parent.joinpath(link).exists()]
    assert not missing


def test_the_reading_list_has_seven_files():
    section = README.split("## Read these seven files in this order")[1].split("\n## ")[0]
    assert len(re.findall(r"^\d+\. \[", section, flags=re.MULTILINE)) == 7


def test_the_picture_shows_the_preset_as_it_is():
    drawn = runpy.run_path(str(ROOT / ".github" / "picture.py"))["draw_preset"]("tiny")
    assert drawn == (ROOT / ".github" / "grid.svg").read_text(encoding="utf-8"), (
        "run python .github/picture.py"
    )
