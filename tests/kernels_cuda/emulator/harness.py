"""Compiles the lightning kernels with g++ for the emulator and calls their C launchers through ctypes.

A kernel source may be changed on the way: the fault tests plant one wrong line and expect the run to notice.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from kernels_cuda.lightning.plan import ScanPlan, plan_scan, plan_states

ROOT = Path(__file__).resolve().parents[3]
CSRC = ROOT / "kernels_cuda" / "csrc"
LIGHTNING = ROOT / "kernels_cuda" / "lightning" / "lightning_sm90.cu"
DECODE = ROOT / "kernels_cuda" / "lightning" / "decode_sm90.cu"
COMPILE_TIMEOUT_S = 600
FEW_MULTIPROCESSORS = 3

POINTERS = "q k v o slopes state_in state_out workspace items state_items".split()
STRIDES = [f"{x}_stride_{dim}" for x in "qkvo" for dim in ("token", "head")]
STATE_STRIDES = [f"state_in_stride_{dim}" for dim in ("document", "head", "key", "value")]
COUNTS = "num_items num_state_items segment_tokens num_tokens num_heads key_dim value_dim reverse".split()


class ScanCall(ctypes.Structure):
    """M1LightningScan of csrc/launch.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in STRIDES + STATE_STRIDES),
        *((name, ctypes.c_int32) for name in COUNTS),
        ("scale", ctypes.c_float),
        ("num_multiprocessors", ctypes.c_int32),
        ("stream", ctypes.c_void_p),
    ]


class DecodeCall(ctypes.Structure):
    """M1LightningDecode of csrc/launch.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "q k v o slopes state".split()),
        *((f"{x}_stride_{dim}", ctypes.c_int64) for x in "qkv" for dim in ("sequence", "head")),
        *((name, ctypes.c_int32) for name in "num_sequences num_heads key_dim value_dim".split()),
        ("scale", ctypes.c_float),
        ("stream", ctypes.c_void_p),
    ]


class EmulatorFault(Exception):
    """The emulator stopped the run; the message says what it saw."""


def compile_kernel(source: Path, text: str | None = None) -> ctypes.CDLL:
    """Build one kernel source, or a changed text of it, for the emulator; kept under build/ by content."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on PATH: the emulator cannot be built")
    text = source.read_text() if text is None else text
    headers = sorted(path for pattern in ("*.h", "*.cuh", "emulator/*.h") for path in CSRC.glob(pattern))
    digest = hashlib.sha256(b"".join([text.encode(), *(path.read_bytes() for path in headers)])).hexdigest()[
        :16
    ]
    folder = ROOT / "build" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{source.stem}-{digest}.so"
    if not library.exists():
        changed, partial = (
            folder / f"{digest}-{os.getpid()}.cu",
            library.with_suffix(f".{os.getpid()}.partial"),
        )
        changed.write_text(text)
        flags = ["-x", "c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas"]
        command = ["g++", *flags, f"-I{CSRC}", f"-I{source.parent}", str(changed), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
        assert done.returncode == 0, done.stderr
        changed.unlink()
        partial.replace(library)
    loaded = ctypes.CDLL(str(library))
    loaded.m1_emulator_error.restype = ctypes.c_char_p
    return loaded


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def run_or_raise(library: ctypes.CDLL, code: int) -> None:
    if code != 0:
        raise EmulatorFault(library.m1_emulator_error().decode() or f"the launcher returned {code}")


def launch_scan(
    library: ctypes.CDLL,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    state_in: torch.Tensor | None,
    items: torch.Tensor,
    state_items: torch.Tensor,
    segment_tokens: int,
    reverse: bool,
    scale: float,
    num_multiprocessors: int,
    o: torch.Tensor,
    state_out: torch.Tensor | None,
    workspace: torch.Tensor | None,
) -> None:
    """m1_sm90::lightning_scan, as bind.cpp calls the launcher."""
    tensors = (q, k, v, o, slopes, state_in, state_out, workspace, items, state_items)
    strides = [stride for x in (q, k, v, o) for stride in x.stride()[:2]]
    state_strides = (0, 0, 0, 0) if state_in is None else state_in.stride()
    counts = (len(items), len(state_items), segment_tokens, *q.shape, v.shape[2], int(reverse))
    call = ScanCall(
        *map(address, tensors), *strides, *state_strides, *counts, scale, num_multiprocessors, None
    )
    run_or_raise(library, library.m1_lightning_scan_sm90(ctypes.byref(call)))


def launch_states(
    library: ctypes.CDLL,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    state_items: torch.Tensor,
    reverse: bool,
    num_multiprocessors: int,
    workspace: torch.Tensor,
) -> None:
    """m1_sm90::lightning_states, as bind.cpp calls the launcher."""
    tensors = (None, k, v, None, slopes, None, None, workspace, None, state_items)
    strides = [stride for x in (k, k, v, v) for stride in x.stride()[:2]]
    counts = (0, len(state_items), 0, *k.shape, v.shape[2], int(reverse))
    call = ScanCall(*map(address, tensors), *strides, 0, 0, 0, 0, *counts, 1.0, num_multiprocessors, None)
    run_or_raise(library, library.m1_lightning_scan_sm90(ctypes.byref(call)))


def launch_decode(
    library: ctypes.CDLL,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    state: torch.Tensor,
    scale: float,
    o: torch.Tensor,
) -> None:
    """m1_sm90::lightning_decode, as bind.cpp calls the launcher."""
    strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]
    call = DecodeCall(*map(address, (q, k, v, o, slopes, state)), *strides, *q.shape, v.shape[2], scale, None)
    run_or_raise(library, library.m1_lightning_decode_sm90(ctypes.byref(call)))


def emulate_scan(
    library: ctypes.CDLL,
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    slopes: torch.Tensor,
    state_in: torch.Tensor | None,
    borders: tuple[int, ...],
    reverse: bool = False,
    scale: float = 1.0,
    plan: ScanPlan | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the scan kernel on three emulated multiprocessors; everything it must write starts as NaN."""
    q, k, v = operands
    num_tokens, num_heads, key_dim = q.shape
    value_dim = v.shape[2]
    plan = plan or plan_scan(borders, num_heads, value_dim, reverse, FEW_MULTIPROCESSORS)
    o = torch.full((num_tokens, num_heads, value_dim), float("nan"), dtype=torch.bfloat16)
    state_shape = (num_heads, key_dim, value_dim)
    state_out = torch.full((len(borders) - 1, *state_shape), float("nan"))
    workspace = torch.full((max(plan.num_slots, 1), *state_shape), float("nan"))
    launch_scan(
        library,
        q,
        k,
        v,
        slopes,
        state_in,
        plan.items,
        plan.state_items,
        plan.segment_tokens,
        reverse,
        scale,
        FEW_MULTIPROCESSORS,
        o,
        state_out,
        workspace,
    )
    return o, state_out


def emulate_states(
    library: ctypes.CDLL,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    spans: tuple[tuple[int, int], ...],
    reverse: bool,
) -> torch.Tensor:
    """Run the prepass alone on one emulated multiprocessor, where no span is cut: [M, H, K, V]."""
    plan = plan_states(spans, k.shape[1], v.shape[2], reverse, 1)
    workspace = torch.full((plan.num_slots, *k.shape[1:], v.shape[2]), float("nan"))
    launch_states(library, k, v, slopes, plan.items, reverse, 1, workspace)
    return workspace


def emulate_decode(
    library: ctypes.CDLL,
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    slopes: torch.Tensor,
    state: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Run the decode kernel; state is updated in place."""
    o = torch.full(operands[2].shape, float("nan"), dtype=torch.bfloat16)
    launch_decode(library, *operands, slopes, state, scale, o)
    return o
