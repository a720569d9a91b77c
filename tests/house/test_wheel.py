"""The wheel holds our four packages, all of them, and nothing else; and a foreign `parallel` is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.house.checkout import ROOT, files

PACKAGES = {"kernels_cuda", "parallel", "megatron_m1", "data_pipeline"}
DATA_SUFFIXES = {".py", ".cu", ".cuh", ".h", ".cpp", ".yaml"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a clean copy of the checkout, without network, build isolation or kernels."""
    copy = tmp_path_factory.mktemp("checkout")
    for file in files():
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, copy / file)
    target = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    command = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(target), str(copy)]
    build = subprocess.run(
        command, env={**os.environ, "M1_BUILD_KERNELS": "0"}, capture_output=True, text=True
    )
    assert build.returncode == 0, build.stdout + build.stderr
    return next(target.glob("*.whl"))


def test_the_wheel_holds_exactly_our_four_packages(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES


def test_the_wheel_holds_every_source_file_of_the_packages(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        file.as_posix() for file in files() if file.parts[0] in PACKAGES and file.suffix in DATA_SUFFIXES
    }
    assert expected - inside == set(), "a folder without __init__.py, or a suffix missing from package_data"


def test_the_wheel_holds_the_presets_the_command_and_the_license(wheel):
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    assert any(name.startswith("megatron_m1/presets/") and name.endswith(".yaml") for name in names)
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert "m1 = megatron_m1.cli:main" in archive.read(entry_points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_a_wheel_without_kernels_fits_any_platform(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_a_foreign_package_named_parallel_is_refused(tmp_path):
    (tmp_path / "parallel").mkdir()
    (tmp_path / "parallel" / "__init__.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", "import megatron_m1"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "package 'parallel' resolves to" in done.stderr
    assert str(tmp_path / "parallel") in done.stderr
