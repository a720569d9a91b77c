"""The MoE part of the first run on a Hopper GPU: python -m kernels_cuda.bench.first_light_moe [--out FOLDER].

Correctness of every kernel against fp64, compute-sanitizer on small shapes, times against torch._grouped_mm and
dense cuBLAS. Writes first_light_moe.json and prints the tables; exits with 1 where a check failed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from kernels_cuda import build
from kernels_cuda.bench import moe
from kernels_cuda.bench.first_light import print_rows, sanitize


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for first_light_moe.json")
    parser.add_argument("--skip-sanitizer", action="store_true", help="leave compute-sanitizer out")
    arguments = parser.parse_args()
    began = time.monotonic()
    if not build.load_library():
        print(f"no kernels: {build.why_not()}")
        return 1
    report: dict = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    report["correctness"] = moe.correctness()
    print_rows("MoE correctness, relative RMS against fp64", report["correctness"])
    report["timings"] = moe.timings()
    print_rows("MoE", report["timings"])
    report["sanitizer"] = []
    if not arguments.skip_sanitizer:
        tools = ("memcheck", "racecheck")
        report["sanitizer"] = [sanitize(tool, "kernels_cuda.bench.small_moe") for tool in tools]
        print_rows("compute-sanitizer", report["sanitizer"])
    report["seconds"] = round(time.monotonic() - began, 1)
    (arguments.out / "first_light_moe.json").write_text(json.dumps(report, indent=1))
    failed = [row for row in (*report["correctness"], *report["sanitizer"]) if not row["passed"]]
    print(f"\n{report['seconds']} s; {len(failed)} checks failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
