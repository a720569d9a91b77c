"""The batch script as text: what stands in it, that no name is ever read as a command, and that all scripts share one
body. Whether it works is shown by test_jobs.py."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_m1 import cli
from megatron_m1.config import load_run
from megatron_m1.launch.script import BODY, Job, quote_option, render
from megatron_m1.launch.site import Container, Site, load_site, parse_site
from megatron_m1.launch.submit import nodes_for
from tests.house.checkout import ROOT

BY_HAND = sorted((ROOT / "slurm").glob("*.sbatch"))
GUIDE = (ROOT / "slurm" / "README.md").read_text(encoding="utf-8")
MARK = "# ======== From here on"
UGLY = "a \"b\" 'c' $(touch pwned) `touch pwned` 50%j & ; #x"


def job(directory: Path = Path("/data/run"), *arguments: str) -> Job:
    return Job(
        name="run",
        run_dir=directory,
        work_dir=directory,
        command=("train", *arguments),
        num_nodes=2,
        chained=False,
    )


def head_of(script: str) -> str:
    return script.split(MARK)[0]


def names_in(head: str) -> set[str]:
    """Settings that a head makes, the lines it exports aside."""
    return set(re.findall(r"^([A-Z_]+)=", head, flags=re.MULTILINE))


def options_in(head: str) -> set[str]:
    return set(re.findall(r'^#SBATCH "?(--[a-z-]+)', head, flags=re.MULTILINE))


def test_every_script_has_the_same_body_and_sets_the_same_names():
    assert [path.stem for path in BY_HAND] == ["extend", "posttrain", "pretrain"]
    rendered = render(job(), Site())
    for path in BY_HAND:
        text = path.read_text()
        assert text[text.index(MARK) :] == BODY.read_text() == rendered[rendered.index(MARK) :], path.name
        assert names_in(head_of(text)) == names_in(head_of(rendered)), path.name
        assert options_in(head_of(text)) == options_in(head_of(rendered)), path.name


@pytest.mark.parametrize("script", [*BY_HAND, None], ids=lambda path: path.stem if path else "rendered")
def test_bash_reads_every_script(script, tmp_path):
    path = script or tmp_path / "job.sbatch"
    if script is None:
        path.write_text(render(job(tmp_path / UGLY, UGLY), Site()))
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_bash_gets_ugly_names_as_they_are_and_runs_nothing_in_them(tmp_path):
    site = Site(environment={"A": UGLY}, container=Container(image=UGLY, mounts=(UGLY,)), python=UGLY)
    (tmp_path / "head").write_text(head_of(render(job(tmp_path / UGLY, UGLY), site)))
    show = 'set -eu; . ./head; printf "%s\\0" "$RUN_DIR" "$WORK_DIR" "${COMMAND[@]}" "$PYTHON" "${CONTAINER[@]}" "$A"'
    shown = subprocess.run(
        ["bash", "-c", show], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    path = str(tmp_path / UGLY)
    flags = [f"--container-image={UGLY}", f"--container-mounts={UGLY}", f"--container-workdir={path}"]
    assert shown.split("\0")[:-1] == [path, path, "train", UGLY, UGLY, *flags, UGLY]
    assert [entry.name for entry in tmp_path.iterdir()] == ["head"]


def test_an_option_with_a_blank_is_quoted_as_sbatch_reads_it():
    assert quote_option("--nodes=2") == "--nodes=2"
    assert quote_option('--comment=a "b" \\c') == '"--comment=a \\"b\\" \\\\c"'


@pytest.mark.parametrize("directory", ["relative", "/a\\b", "/a\nb"])
def test_a_directory_that_no_script_can_hold_is_refused(directory):
    with pytest.raises(ValueError, match="cannot be used in a batch script"):
        job(Path(directory))


def test_a_site_reaches_the_head():
    text = """\
account: us
partition: big
time: 2-00:00:00
gpus_per_node: 4
cpus_per_rank: 12
signal_before_end_s: 120
launcher: torchrun
sbatch: [--exclusive, "--comment=two words"]
setup: [module load cuda]
environment: {NCCL_DEBUG: WARN}
preflight: {min_scratch_gib: 2.5}
"""
    script = render(job(), parse_site(text, source="site"))
    for line in (
        "#SBATCH --account=us", "#SBATCH --partition=big", "#SBATCH --time=2-00:00:00", "#SBATCH --gpus-per-node=4",
        "#SBATCH --ntasks-per-node=4", "#SBATCH --cpus-per-task=12", "#SBATCH --exclusive",
        '#SBATCH "--comment=two words"', "LAUNCHER=torchrun", "module load cuda", "export NCCL_DEBUG=WARN",
    ):  # fmt: skip
        assert f"\n{line}\n" in script
    assert "--limit=min_scratch_gib=2.5" in script
    # torchrun dies of the signal
    assert "--signal" not in script
    assert "#SBATCH --signal=USR1@300" in render(job(), Site())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("acount: us", "unknown key 'acount': did you mean 'account'"),
        ("time: soon", "time='soon' is not a wall-time"),
        ("gpus_per_node: 0", "puts no rank on a node"),
        ("environment: {1A: x}", "environment name '1A' is not a variable"),
        ("sbatch: [exclusive]", "sbatch option 'exclusive' does not begin with '-'"),
        ("max_starts_without_progress: 0", "it must be 1 or more"),
        ("gpus_per_node: many", "gpus_per_node='many' is not legal"),
        ("launcher: mpirun", "launcher='mpirun' is not legal"),
    ],
)
def test_a_wrong_site_is_refused_in_one_sentence(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_site(text, source="site file x")


def test_the_site_file_to_start_from_is_legal():
    assert load_site(ROOT / "slurm" / "site.yaml").gpus_per_node == 8


def test_nodes_are_those_of_the_layout_or_those_asked_for():
    site = Site(gpus_per_node=4)
    assert nodes_for(16, site, None) == 4
    assert nodes_for(16, site, 6) == 6
    with pytest.raises(ValueError, match="6 ranks do not fill nodes of 4"):
        nodes_for(6, site, None)


def test_a_dry_run_shows_the_script_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ["launch", "slurm", "tiny", "run_dir=runs/a b", "--site", str(ROOT / "slurm" / "site.yaml")]
    shown = CliRunner().invoke(cli.app, [*arguments, "--nodes", "3", "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "\n#SBATCH --nodes=3\n" in shown.stdout
    assert f"\nRUN_DIR='{tmp_path}/runs/a b'\n" in shown.stdout
    assert shown.stdout.rstrip().endswith(BODY.read_text().rstrip())
    assert list(tmp_path.iterdir()) == []
    # without --dry-run, and where no Slurm is, the way out is said
    refused = CliRunner().invoke(cli.app, [*arguments, "--nodes", "3"])
    assert "look at the script with --dry-run" in str(refused.exception)
    assert list(tmp_path.iterdir()) == []


def test_jobs_of_neighbouring_numbers_share_no_port():
    """A job also takes the port behind its own, in preflight."""
    (port,) = re.findall(r"MASTER_PORT=(\$\(\(.*\)\))$", BODY.read_text(encoding="utf-8"), flags=re.MULTILINE)
    count = f"for ((SLURM_JOB_ID = 5900; SLURM_JOB_ID < 6100; SLURM_JOB_ID++)); do echo {port}; done"
    ports = subprocess.run(["bash", "-c", count], capture_output=True, text=True, check=True).stdout.split()
    taken = [int(text) + more for text in ports for more in (0, 1)]
    assert len(set(taken)) == 400
    assert min(taken) > 1024 and max(taken) < 32768


def test_the_readme_goes_to_two_nodes_in_ten_lines(tmp_path, monkeypatch):
    block = re.findall(r"^```bash\n(.*?)^```$", GUIDE, flags=re.DOTALL | re.MULTILINE)[0].splitlines()
    assert len(block) <= 10
    monkeypatch.chdir(tmp_path)
    (added,) = [shlex.split(line)[1] for line in block if line.startswith("echo")]
    site = (ROOT / "slurm" / "site.yaml").read_text() + added + "\n"
    (tmp_path / "my-site.yaml").write_text(site)
    (shown,) = [shlex.split(line)[1:] for line in block if line.endswith("--dry-run")]
    script = CliRunner().invoke(cli.app, shown).stdout
    assert "\n#SBATCH --nodes=2\n" in script and "\n#SBATCH --ntasks-per-node=2\n" in script
    assert f"{shlex.join(['.venv/bin/m1', *shown[:-1]])}" in block


def test_the_readmes_copies_on_nodes_are_a_legal_section(tmp_path):
    (section,) = re.findall(r"^```yaml\n(.*?)^```$", GUIDE, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "run.yaml").write_text(f"preset: tiny\n{section}")
    local = load_run(tmp_path / "run.yaml").checkpoint.local
    assert (local.directory, local.every_steps, local.peer) == ("/scratch/m1", 50, True)
