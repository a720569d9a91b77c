"""The kernel library: it builds where nvcc is, loads in a torch without CUDA, and its machine code is what we want."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kernels_cuda import build
from tests.house.checkout import files

ROOT = Path(__file__).resolve().parents[2]
needs_nvcc = pytest.mark.skipif(
    build.find_nvcc() is None, reason="nvcc is not installed: nothing to build with"
)

# Tensor core and bulk copy instructions that the kernels of a name must hold in SASS, at least.
EXPECTED_SASS = {
    r"grouped_kernelILNS0_3UseE\d": {"HGMMA": 4, r"UTMALDG\.3D\.MULTICAST": 6},
    r"lightning_kernelILi128ELb.ELb1E": {"HGMMA": 24, "UTMALDG": 5, "UTMASTG": 1},
    r"lightning_kernelILi64ELb.ELb1E": {"HGMMA": 16, "UTMALDG": 3, "UTMASTG": 1},
    r"lightning_kernelILi\d+ELb.ELb0E": {"HGMMA": 4, "UTMALDG": 2},
}


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return build.build_library(tmp_path_factory.mktemp("library"))


def logs_of_these_sources() -> dict[str, str]:
    objects = [build.compile_object(source, build.cache_folder()) for source in build.sources()]
    return {path.name: path.with_suffix(".log").read_text() for path in objects}


@needs_nvcc
def test_no_kernel_spills_or_uses_local_memory(library):
    reports = [report for log in logs_of_these_sources().values() for report in build.parse_ptxas(log)]
    assert len(reports) >= 10
    assert [report for report in reports if report.spill_bytes or report.stack_bytes] == []


@needs_nvcc
def test_the_compiler_has_nothing_to_say_about_wgmma(library):
    for name, log in logs_of_these_sources().items():
        assert not re.search(r"C75\d\d|[Ww]arning", log), f"{name}: {log}"


def find_tool(name: str) -> str | None:
    """Return a disassembler of the toolkit or of NVIDIA's wheels."""
    folders = [path / "nvidia" / "cu13" / "bin" for path in map(Path, sys.path)]
    found = (shutil.which(name, path=str(folder)) for folder in [*folders, Path("/usr/local/cuda/bin")])
    return shutil.which(name) or next(filter(None, found), None)


@needs_nvcc
@pytest.mark.skipif(find_tool("cuobjdump") is None, reason="cuobjdump is in neither the toolkit nor a wheel")
def test_the_machine_code_uses_the_tensor_cores_and_the_copy_engine(library):
    cuobjdump = find_tool("cuobjdump")
    assert cuobjdump is not None
    path = f"{Path(cuobjdump).parent}:/usr/bin:/bin"
    text = subprocess.run(
        [cuobjdump, "-sass", str(library)], check=True, capture_output=True, text=True, env={"PATH": path}
    ).stdout
    kernels = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", text, flags=re.DOTALL))
    assert len(kernels) >= 10
    for piece, wanted in EXPECTED_SASS.items():
        mine = {name: code for name, code in kernels.items() if re.search(piece, name)}
        assert mine, f"no kernel named {piece} among {sorted(kernels)}"
        for name, code in mine.items():
            for instruction, least in wanted.items():
                assert len(re.findall(rf"\b{instruction}\b", code)) >= least, f"{name} {instruction}"
    assert not [name for name, code in kernels.items() if re.search(r"\b(LDL|STL)\b", code)]


LOAD = """
import sys, torch
torch.ops.load_library(sys.argv[1])

for name in sys.argv[2:]:
    schema = getattr(torch.ops.m1_sm90, name).default._schema
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"m1_sm90::{name}", "CUDA"), name
    print(schema)
try:
    torch.ops.m1_sm90.moe_route(torch.zeros(1, 2), torch.zeros(1, 1), torch.zeros(1, 1))
except NotImplementedError as error:
    print("refused:", str(error).splitlines()[0][:60])
"""


@needs_nvcc
def test_the_library_loads_without_cuda_and_its_schemas_are_there(library):
    text = (ROOT / "kernels_cuda" / "csrc" / "bind.cpp").read_text()
    names = re.findall(r'm\.impl\("(\w+)"', text)
    assert len(names) == text.count("m.def(") >= 10
    command = [sys.executable, "-c", LOAD, str(library), *names]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(names) + 1
    assert "grouped_gate_up" in result.stdout
    assert lines[-1].startswith("refused: Could not run 'm1_sm90::moe_route'")


@needs_nvcc
def test_the_library_needs_torch_cpu_and_no_cuda_library(library):
    result = subprocess.run(["readelf", "-d", str(library)], check=True, capture_output=True, text=True)
    needed = re.findall(r"NEEDED.*\[(\S+)\]", result.stdout)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "cuda" in name or "python" in name]


@needs_nvcc
def test_the_library_uses_only_the_stable_c_functions_of_torch(library):
    command = ["nm", "-D", "--undefined-only", str(library)]
    symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    torch_symbols = [symbol for symbol in symbols if "torch" in symbol]
    assert all(symbol.startswith(("aoti_torch_", "torch_")) for symbol in torch_symbols), torch_symbols
    assert not [symbol for symbol in symbols if symbol.startswith(("_ZN3c10", "_ZN2at", "_ZN5torch", "Py"))]


@needs_nvcc
def test_pip_puts_the_library_into_the_wheel_and_ties_it_to_no_python(library, tmp_path):
    copy, wheels = tmp_path / "checkout", tmp_path / "wheels"
    for file in files():
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, copy / file)
    # compiled by the fixture: here only the link is left
    shutil.copytree(build.cache_folder(), copy / "build" / "kernels")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "--no-build-isolation", "-w", str(wheels), str(copy)],
        env={**os.environ, "M1_BUILD_KERNELS": "1"},
        check=True,
        capture_output=True,
    )
    [wheel] = wheels.glob("*.whl")
    assert re.search(r"-py3-none-linux_\w+\.whl$", wheel.name), wheel.name
    packed = f"kernels_cuda/{build.library_name()}"
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(packed, tmp_path)
    command = [sys.executable, "-c", LOAD, str(tmp_path / packed), "moe_route"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("m1_sm90::moe_route(")


def test_the_name_of_the_library_follows_its_sources(monkeypatch, tmp_path):
    before = build.library_name()
    copy = tmp_path / "kernels_cuda"
    shutil.copytree(build.PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    monkeypatch.setattr(build, "PACKAGE", copy)
    assert build.library_name() == before
    header = copy / "csrc" / "tile.cuh"
    header.write_text(header.read_text() + "\n// changed\n")
    assert build.library_name() != before


def test_a_missing_nvcc_is_said_in_words(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(RuntimeError, match="cannot be built: nvcc is neither on PATH"):
        build.build_library(tmp_path)


def test_a_failing_compiler_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setattr(
        build, "command_for", lambda source: [sys.executable, "-c", "raise SystemExit('no such arch')"]
    )
    with pytest.raises(RuntimeError, match="no such arch"):
        build.compile_object(build.sources()[0], tmp_path)


def test_without_a_gpu_the_kernels_are_off_and_it_is_said_once(caplog):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    build.load_library.cache_clear()
    assert not build.load_library()
    assert not build.load_library()
    assert [record.message for record in caplog.records].count(
        "CUDA kernels are off: torch sees no CUDA device: every operator runs on its PyTorch path"
    ) == 1


def test_ptxas_reports_are_read():
    log = """ptxas info    : Function properties for _Z3addv
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
ptxas info    : Function properties for _Z3subv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 7 registers"""
    first, second = build.parse_ptxas(log)
    assert (first.name, first.registers, first.stack_bytes, first.spill_bytes) == ("_Z3addv", 40, 8, 16)
    assert (second.registers, second.spill_bytes) == (7, 0)
