"""Finds nvcc, builds the kernel library for sm_90a, loads it, or says once what is missing.

One object per source file, cached by the hash of everything it can include; one library bound through the
LibTorch stable ABI (target 2.10), static CUDA runtime, no Python symbol: the same file loads in any torch
from 2.10 on, with or without CUDA. setup.py loads this file by path, so nothing here imports torch before it
must.
"""

import functools
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parent
CUDA_FLAGS = (
    "-O3",
    "-std=c++17",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xptxas=-v",
    "-lineinfo",
    # Division to 2 ulp in place of a branch and a call per sigmoid.
    "-prec-div=false",
)
BIND_FLAGS = ("-O2", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA")
# The oldest torch whose stable ABI has what bind.cpp uses; written as the headers expect it.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
COMPILE_TIMEOUT_S = 900


def find_nvcc() -> Path | None:
    """Return the nvcc on PATH, or the one of the usual install folder, or None."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return Path(found) if found else None


def torch_folder() -> Path | None:
    """Return the folder of the installed torch package without importing it, or None."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def missing_for_build() -> str | None:
    """Return what a build lacks, as a sentence for the user, or None when it can start."""
    if find_nvcc() is None:
        return "nvcc is neither on PATH nor in /usr/local/cuda/bin: install the CUDA 13 toolkit to build the kernels"
    torch_root = torch_folder()
    if torch_root is None:
        return "torch is not installed: the kernels are bound through its stable ABI headers"
    if not (torch_root / "include/torch/csrc/stable/library.h").exists():
        return f"the torch in {torch_root.name} has no stable ABI headers: install torch 2.10 or newer"
    return None


def sources() -> list[Path]:
    """Return the files that become objects: every kernel source and the binding."""
    return [*sorted(PACKAGE.glob("*/*.cu")), PACKAGE / "csrc" / "bind.cpp"]


def headers() -> list[Path]:
    """Return every header a source may include."""
    return sorted(path for suffix in ("h", "cuh") for path in PACKAGE.glob(f"**/*.{suffix}"))


def command_for(source: Path) -> list[str]:
    """Return the compile command of one source, without the output."""
    includes = [f"-I{PACKAGE / 'csrc'}", f"-I{PACKAGE}"]
    if source.suffix == ".cu":
        return [str(find_nvcc()), *CUDA_FLAGS, *includes, "-c", str(source)]
    return [
        str(find_nvcc()),
        *BIND_FLAGS,
        TORCH_TARGET,
        *includes,
        f"-I{torch_folder()}/include",
        "-c",
        str(source),
    ]


def content_hash(paths: list[Path], words: list[str]) -> str:
    """Return 16 hex digits that change when a file's content or name, or one of the words changes."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    for word in words:
        digest.update(word.encode() + b"\0")
    return digest.hexdigest()[:16]


def library_name() -> str:
    """Return the library's file name, which holds the hash of all sources, so a stale one is never loaded."""
    flags = [*CUDA_FLAGS, *BIND_FLAGS, TORCH_TARGET]
    return f"libm1_kernels-{content_hash(sources() + headers(), flags)}.so"


def compile_object(source: Path, cache: Path) -> Path:
    """Compile one source into the cache unless the same content is there; its .log holds the compiler's
    words.

    Raises RuntimeError with the compiler's output when it fails.
    """
    command = command_for(source)
    words = [word.replace(str(PACKAGE), "") for word in command[1:]]
    target = cache / f"{source.stem}-{content_hash([source, *headers()], words)}.o"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.partial")
        target.with_suffix(".log").write_text(run([*command, "-o", str(partial)]))
        partial.replace(target)
    return target


def run(command: list[str]) -> str:
    """Run a compiler and return what it printed; raises RuntimeError with that text when it fails."""
    result = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=COMPILE_TIMEOUT_S,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"exit status {result.returncode} from: {' '.join(command)}\n{result.stdout}")
    return result.stdout


def cache_folder() -> Path:
    """Return the folder of objects and libraries built on first use: beside the checkout, else the user's
    cache."""
    checkout = PACKAGE.parent / "pyproject.toml"
    return (
        PACKAGE.parent / "build" / "kernels" if checkout.exists() else Path.home() / ".cache" / "megatron-m1"
    )


def build_library(directory: Path, cache: Path | None = None) -> Path:
    """Compile what changed and link the library into directory; returns its path.

    Raises RuntimeError naming what is missing, or with the compiler's output.
    """
    reason = missing_for_build()
    if reason is not None:
        raise RuntimeError(f"the CUDA kernels cannot be built: {reason}")
    cache = cache or cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(min(len(sources()), os.cpu_count() or 1)) as pool:
        objects = list(pool.map(lambda source: compile_object(source, cache), sources()))
    target = directory / library_name()
    partial = target.with_suffix(f".{os.getpid()}.partial")
    link = [str(find_nvcc()), "-shared", "-cudart", "static", *map(str, objects), f"-L{torch_folder()}/lib"]
    run([*link, "-ltorch_cpu", "-o", str(partial)])
    partial.replace(target)
    return target


def find_library() -> Path | None:
    """Return the built library of exactly these sources, from the wheel or from an earlier first use, or
    None."""
    candidates = (PACKAGE / library_name(), cache_folder() / library_name())
    return next((path for path in candidates if path.exists()), None)


def why_not() -> str | None:
    """Return why the CUDA kernels cannot run in this process, or None when they can (they may still need a
    build)."""
    import torch

    if not torch.cuda.is_available():
        return "torch sees no CUDA device: every operator runs on its PyTorch path"
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        name = "sm_{}{}".format(*capability)
        return f"the device is {name} and the kernels are sm_90a: every operator runs on its PyTorch path"
    return missing_for_build() if find_library() is None else None


@functools.cache
def load_library() -> bool:
    """Load the kernels, building them first where needed; say once why not. Returns whether they can be
    called."""
    import torch

    reason = why_not()
    if reason is not None:
        logger.warning("CUDA kernels are off: %s", reason)
        return False
    library = find_library()
    if library is None:
        logger.info("building the CUDA kernels for sm_90a, once (a minute or two)")
        library = build_library(cache_folder())
    torch.ops.load_library(str(library))
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelReport:
    """What ptxas said about one kernel."""

    name: str
    registers: int
    stack_bytes: int
    spill_bytes: int


def parse_ptxas(log: str) -> list[KernelReport]:
    """Read the kernels of an nvcc log made with -Xptxas=-v."""
    pattern = re.compile(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r"(?:.|\n)*?Used (\d+) registers"
    )
    return [
        KernelReport(
            name=match[1],
            registers=int(match[5]),
            stack_bytes=int(match[2]),
            spill_bytes=int(match[3]) + int(match[4]),
        )
        for match in pattern.finditer(log)
    ]
