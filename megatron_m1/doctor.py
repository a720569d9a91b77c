"""What this installation can do: versions, devices, and which optional packages are on, off or broken.

Nothing here imports megatron-core: it guards transformer-engine with `except ImportError` only, so an engine
that is installed but cannot load takes `import megatron.core` down with it. apex is never imported either:
the package registry's `apex` is another project, and what NVIDIA's build provides is recognised by two
modules only it has.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
from dataclasses import dataclass
from typing import Literal

State = Literal["on", "off", "broken"]
VERSIONS_OF = (
    "megatron-m1",
    "torch",
    "megatron-core",
    "mlflow",
    "numpy",
    "pydantic",
    "tokenizers",
    "transformers",
)
NVCC_TIMEOUT_S = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """State of one optional piece."""

    name: str
    """What was looked for."""
    state: State
    """`on` is used, `off` is absent and not needed, `broken` is installed and must be repaired or removed."""
    detail: str
    """Version and place when on; otherwise why, and what to do."""


def versions() -> dict[str, str]:
    """Installed version of every package that matters, `not installed` where there is none."""
    found = {name: distribution_version(name) or "not installed" for name in VERSIONS_OF}
    return {"python": platform.python_version(), **found}


def devices() -> list[str]:
    """One line per CUDA device, or one line that says that runs use the CPU."""
    import torch

    if not torch.cuda.is_available():
        build = torch.version.cuda or "none, a CPU build of torch"
        return [f"CPU, {torch.get_num_threads()} threads per process (torch's CUDA: {build})"]
    lines = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        lines.append(f"cuda:{index} {properties.name}, {capability}, {memory}")
    return lines


def findings() -> list[Finding]:
    """State of every optional piece, in the order of the report."""
    return [transformer_engine(), apex(), dali(), nvcc(), cuda_kernels()]


def refuse_broken_packages() -> None:
    """Stop before megatron-core is imported where transformer-engine would take it down.

    Raises:
        ValueError: transformer-engine is installed, whole or in leftovers, and cannot be loaded.
    """
    engine = transformer_engine()
    if engine.state == "broken":
        raise ValueError(f"{engine.name}: {engine.detail}")


def transformer_engine() -> Finding:
    """transformer-engine: on only if its torch part really loads."""
    name = "transformer-engine"
    version = distribution_version(name)
    if version is None:
        spec = importlib.util.find_spec("transformer_engine")
        if spec is None:
            return Finding(
                name=name, state="off", detail="not installed; the layers are torch and our own kernels"
            )
        places = ", ".join(spec.submodule_search_locations or [str(spec.origin)])
        return Finding(
            name=name,
            state="broken",
            detail=f"uninstalled, but megatron-core takes the rest in {places} for it: remove that folder",
        )
    problem = _import_problem("transformer_engine.pytorch")
    if problem:
        detail = f"{version} is installed but does not load ({problem}), and megatron-core dies with it: "
        advice = "install a driver and a matching build, or pip uninstall transformer-engine and its parts"
        return Finding(name=name, state="broken", detail=detail + advice)
    return Finding(name=name, state="on", detail=version)


def apex() -> Finding:
    """NVIDIA apex, by the modules that only its build has; warns about the other project of that name."""
    if "Pyramid" in (_metadata_field("apex", "Summary") or ""):
        return Finding(
            name="apex",
            state="broken",
            detail="the installed 'apex' is a web toolkit for Pyramid, not NVIDIA's: pip uninstall apex",
        )
    present = [
        module for module in ("amp_C", "fused_weight_gradient_mlp_cuda") if importlib.util.find_spec(module)
    ]
    if not present:
        detail = "not installed; torch's own AdamW, norms and gradient accumulation are used"
        return Finding(name="apex", state="off", detail=detail)
    return Finding(name="apex", state="on", detail=f"NVIDIA's build, with {' and '.join(present)}")


def dali() -> Finding:
    """NVIDIA DALI, which needs no driver for the CPU pipelines."""
    for distribution in ("nvidia-dali-cuda130", "nvidia-dali-cuda120"):
        version = distribution_version(distribution)
        if version is None:
            continue
        problem = _import_problem("nvidia.dali")
        if problem:
            detail = f"{distribution} {version} does not load ({problem}): reinstall or uninstall it"
            return Finding(name="DALI", state="broken", detail=detail)
        return Finding(name="DALI", state="on", detail=f"{distribution} {version}")
    return Finding(
        name="DALI",
        state="off",
        detail="not installed (extra 'dali'); the thread loader feeds the same samples",
    )


def nvcc() -> Finding:
    """The CUDA compiler that builds our kernels."""
    path = shutil.which("nvcc")
    if path is None:
        return Finding(
            name="nvcc", state="off", detail="not on PATH; the CUDA kernels cannot be built on this machine"
        )
    try:
        answer = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=NVCC_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(
            name="nvcc", state="broken", detail=f"{path} does not run ({error}): repair the CUDA toolkit"
        )
    release = next((line for line in answer.stdout.splitlines() if "release" in line), "unknown release")
    return Finding(name="nvcc", state="on", detail=f"{release.split('release')[-1].strip()} at {path}")


def distribution_version(name: str) -> str | None:
    """Version of an installed distribution, None where there is none."""
    return _metadata_field(name, "Version")


def _metadata_field(distribution: str, field: str) -> str | None:
    try:
        return importlib.metadata.metadata(distribution)[field]
    except importlib.metadata.PackageNotFoundError:
        return None


def _import_problem(module: str) -> str | None:
    """Why a module does not import, None when it does. Any exception counts: broken CUDA packages raise
    OSError, RuntimeError and FileNotFoundError as well as ImportError."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def cuda_kernels() -> Finding:
    """Our own kernels: on where a device of the right kind is usable and the library is built or can be."""
    from kernels_cuda import build

    name = "CUDA kernels"
    reason = build.why_not()
    if reason is not None:
        return Finding(name=name, state="off", detail=reason)
    library = build.find_library()
    return Finding(name=name, state="on", detail=str(library) if library else "will be built on first use")
