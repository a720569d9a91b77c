"""The doctor tells healthy, absent and broken installations apart, with fake ones on a path of its own."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_m1 import doctor

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder in front of sys.path; what was imported from it is forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("transformer_engine", "nvidia", "amp_C", "fused_weight_gradient_mlp_cuda"):
            del sys.modules[name]
    importlib.invalidate_caches()


def install(site: Path, distribution: str, version: str, summary: str = "", **modules: str) -> None:
    """Write a distribution's metadata and its modules (`package__module="source"`) into a site folder."""
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\nSummary: {summary}\n"
    (info / "METADATA").write_text(metadata)
    for name, source in modules.items():
        path = site.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        for package in path.relative_to(site).parents[:-1]:
            (site / package / "__init__.py").touch()
        path.write_text(source)
    importlib.invalidate_caches()


@pytest.fixture
def broken_engine(site):
    install(site, "transformer-engine", "2.9.0")
    (site / "transformer_engine").mkdir()
    text = "raise RuntimeError('cudnn shared object not found.')"
    (site / "transformer_engine" / "__init__.py").write_text(text)
    importlib.invalidate_caches()
    return site


def test_an_absent_engine_is_off():
    assert doctor.transformer_engine().state == "off"


def test_a_working_engine_is_on(site):
    install(site, "transformer-engine", "2.9.0", transformer_engine__pytorch="")
    finding = doctor.transformer_engine()
    assert (finding.state, finding.detail) == ("on", "2.9.0")


def test_an_engine_that_does_not_load_is_broken_and_says_why(broken_engine):
    finding = doctor.transformer_engine()
    assert finding.state == "broken"
    assert "RuntimeError: cudnn shared object not found." in finding.detail
    assert "pip uninstall" in finding.detail


def test_an_engine_without_its_torch_part_is_broken(site):
    install(
        site,
        "transformer-engine",
        "2.9.0",
        transformer_engine__pytorch="raise FileNotFoundError('torch lib')",
    )
    assert doctor.transformer_engine().state == "broken"


def test_the_folder_an_uninstall_left_behind_is_broken(site):
    (site / "transformer_engine").mkdir()
    importlib.invalidate_caches()
    finding = doctor.transformer_engine()
    assert finding.state == "broken"
    assert str(site / "transformer_engine") in finding.detail


def test_a_run_is_refused_before_megatron_core_would_die(broken_engine):
    with pytest.raises(ValueError, match="does not load"):
        doctor.refuse_broken_packages()


def test_megatron_core_really_dies_with_a_broken_engine(broken_engine):
    """The reason for the check above; when this fails, megatron-core has learnt to catch it."""
    environment = {**os.environ, "PYTHONPATH": str(broken_engine)}
    command = [sys.executable, "-c", "import megatron.core"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "cudnn shared object not found" in done.stderr


def test_train_stops_with_one_sentence_on_a_broken_engine(broken_engine):
    environment = {**os.environ, "PYTHONPATH": f"{broken_engine}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "megatron_m1", "train", "tiny"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "cudnn shared object not found" in done.stderr


def test_the_other_project_named_apex_is_broken(site):
    install(site, "apex", "0.9.10.dev0", summary="Pyramid toolkit to add Velruse, Flash Messages and CSRF")
    finding = doctor.apex()
    assert finding.state == "broken"
    assert "pip uninstall apex" in finding.detail


def test_apex_is_never_imported(site):
    install(site, "apex", "0.9.10.dev0", summary="Pyramid toolkit", apex="raise SystemExit('imported')")
    doctor.findings()
    assert "apex" not in sys.modules


def test_nvidias_apex_is_known_by_the_modules_only_it_has(site):
    install(site, "apex", "0.1", amp_C="", fused_weight_gradient_mlp_cuda="raise SystemExit('imported')")
    finding = doctor.apex()
    assert finding.state == "on"
    assert "amp_C and fused_weight_gradient_mlp_cuda" in finding.detail


def test_absent_apex_is_off():
    assert doctor.apex().state == "off"


def test_dali_that_does_not_load_is_broken(site, monkeypatch):
    # another test of this process may have imported the real one
    for name in [name for name in sys.modules if name.split(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    install(site, "nvidia-dali-cuda130", "2.4.0")
    (site / "nvidia" / "dali").mkdir(parents=True)
    (site / "nvidia" / "__init__.py").touch()
    (site / "nvidia" / "dali" / "__init__.py").write_text("raise OSError('libdali.so: no such file')")
    importlib.invalidate_caches()
    finding = doctor.dali()
    assert finding.state == "broken"
    assert "OSError: libdali.so" in finding.detail


def test_nvcc_that_does_not_run_is_broken(tmp_path, monkeypatch):
    fake = tmp_path / "nvcc"
    fake.write_text("#!/bin/sh\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.nvcc().state == "broken"


def test_nvcc_reports_its_release_and_place(tmp_path, monkeypatch):
    fake = tmp_path / "nvcc"
    fake.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.nvcc().detail == f"13.0, V13.0.88 at {fake}"


def test_absent_nvcc_is_off(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.nvcc().state == "off"


def test_kernels_are_off_with_the_reason_where_there_is_no_device(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    finding = doctor.cuda_kernels()
    assert finding.state == "off"
    assert "no CUDA device" in finding.detail


def test_versions_name_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(doctor, "VERSIONS_OF", ("torch", "no-such-distribution"))
    versions = doctor.versions()
    assert versions["python"].startswith("3.")
    assert versions["no-such-distribution"] == "not installed"


def test_the_command_exits_1_when_something_is_broken(broken_engine):
    environment = {**os.environ, "PYTHONPATH": f"{broken_engine}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "megatron_m1", "doctor"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "transformer-engine   broken" in done.stdout
    assert "cudnn shared object not found" in done.stdout
