"""The first run on a Hopper GPU: python -m kernels_cuda.bench.first_light [--out FOLDER] [--skip-sanitizer].

Ceilings, correctness of every kernel against fp64, compute-sanitizer on small shapes, times against the peers.
Writes first_light.json and prints the tables; exits with 1 where a check failed. Parts: bench/lightning.py here,
the mixture of experts in bench/first_light_moe.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from kernels_cuda import build
from kernels_cuda.bench import lightning, measure

SANITIZER_TIMEOUT_S = 150


def sanitize(tool: str, module: str) -> dict[str, str | bool]:
    """Run a module of small shapes under one tool of compute-sanitizer."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return {
            "tool": tool,
            "module": module,
            "passed": False,
            "said": "compute-sanitizer is not on PATH: not measured",
        }
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", module]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SANITIZER_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return {
            "tool": tool,
            "module": module,
            "passed": False,
            "said": f"no end within {SANITIZER_TIMEOUT_S} s",
        }
    lines = (done.stdout + done.stderr).strip().splitlines()
    return {"tool": tool, "module": module, "passed": done.returncode == 0, "said": "\n".join(lines[-25:])}


def print_rows(title: str, rows: list[dict]) -> None:
    """One line per row, nested values left to the JSON."""
    print(f"\n{title}")
    for row in rows:
        cells = [
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.items()
            if not isinstance(value, dict)
        ]
        print("  " + " | ".join(cells), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for first_light.json")
    parser.add_argument("--skip-sanitizer", action="store_true", help="leave compute-sanitizer out")
    arguments = parser.parse_args()
    began = time.monotonic()
    if not build.load_library():
        print(f"no kernels: {build.why_not()}")
        return 1
    report: dict = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    report["correctness"] = lightning.correctness()
    print_rows("correctness, worst head, relative RMS against fp64", report["correctness"])
    report["copy_tb_per_s"] = measure.copy_bytes_per_s() / 1e12
    report["cublas_tflop_per_s"] = measure.matmul_flops_per_s(8192, 8192, 8192) / 1e12
    print_rows("ceilings", [{key: report[key] for key in ("copy_tb_per_s", "cublas_tflop_per_s")}])
    report["timings"] = lightning.timings(report["copy_tb_per_s"] * 1e12)
    report["fla_error"] = lightning.peer_error(lightning.CORRECTNESS_SHAPES[0])
    print_rows("lightning attention", report["timings"])
    print(f"fla's error on one document: {report['fla_error']}")
    report["sanitizer"] = []
    if not arguments.skip_sanitizer:
        tools = ("memcheck", "racecheck", "synccheck")
        report["sanitizer"] = [sanitize(tool, "kernels_cuda.bench.small_lightning") for tool in tools]
        print_rows("compute-sanitizer", report["sanitizer"])
    report["seconds"] = round(time.monotonic() - began, 1)
    (arguments.out / "first_light.json").write_text(json.dumps(report, indent=1))
    failed = [row for row in (*report["correctness"], *report["sanitizer"]) if not row["passed"]]
    print(f"\n{report['seconds']} s; {len(failed)} checks failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
