"""The kernels on a Hopper GPU in one go: python -m kernels_cuda.bench.first_light [--out FOLDER] [--only PART].

Ceilings, correctness of every kernel against fp64, compute-sanitizer on small shapes, times against the peers.
Parts: lightning, moe, sanitizer; all without a choice, in under 8 minutes. Writes first_light.json and
first_light.md (the tables of BENCHMARKS.md) to the folder; exits with 1 where a check failed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from kernels_cuda import build
from kernels_cuda.bench import background, lightning, measure, moe, tables

PARTS = ("lightning", "moe", "sanitizer")


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


def check(parts: list[str], out: Path) -> dict[str, list[dict]]:
    """Everything that is judged, none of it timed: values here, the sanitizer and the peer's compiler beside it."""
    began = time.monotonic()
    peer = background.start_peer_compilation(out) if "lightning" in parts else []
    sanitizers = background.start_sanitizers(out) if "sanitizer" in parts else []
    report: dict[str, list[dict]] = {}
    if "lightning" in parts:
        report["lightning correctness"] = lightning.correctness()
        print_rows("lightning, worst head, relative RMS against fp64", report["lightning correctness"])
    if "moe" in parts:
        report["moe correctness"] = moe.correctness()
        print_rows("mixture of experts, relative RMS against fp64", report["moe correctness"])
    if "sanitizer" in parts:
        report["sanitizer"] = background.finish_sanitizers(sanitizers, began)
        print_rows("compute-sanitizer", report["sanitizer"])
    for job in peer:
        done, said = job.finish(began + background.PEER_TIMEOUT_S)
        if not done:
            print(f"{job.name}: {said}")
    torch.cuda.empty_cache()
    print(f"checked in {time.monotonic() - began:.0f} s", flush=True)
    return report


def measure_all(parts: list[str]) -> dict:
    """Ceilings and times."""
    report: dict = {
        "copy_tb_per_s": measure.copy_bytes_per_s() / 1e12,
        "cublas_tflop_per_s": measure.matmul_flops_per_s(8192, 8192, 8192) / 1e12,
    }
    print_rows("ceilings", [report])
    if "lightning" in parts:
        report["lightning"] = lightning.timings(report["copy_tb_per_s"] * 1e12)
        report["fla_error"] = lightning.peer_error(lightning.CORRECTNESS_SHAPES[0])
        print_rows("lightning attention", report["lightning"])
        print(f"fla's error on one document: {report['fla_error']}", flush=True)
    if "moe" in parts:
        report["moe"] = moe.timings(report["copy_tb_per_s"] * 1e12, report["cublas_tflop_per_s"] * 1e12)
        print_rows("mixture of experts", report["moe"])
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=PARTS, help="this part; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the report")
    arguments = parser.parse_args()
    parts = arguments.only or list(PARTS)
    began = time.monotonic()
    if not build.load_library():
        print(f"no kernels: {build.why_not()}")
        return 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    report: dict = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    report["build_s"] = round(time.monotonic() - began, 1)
    checks = check(parts, arguments.out)
    report |= checks | measure_all(parts)
    report["seconds"] = round(time.monotonic() - began, 1)
    (arguments.out / "first_light.json").write_text(json.dumps(report, indent=1))
    text = tables.markdown(report)
    (arguments.out / "first_light.md").write_text(text)
    failed = [row for rows in checks.values() for row in rows if not row["passed"]]
    print(
        f"\n{text}\n{report['seconds']} s, {report['build_s']} of them to build or load; {len(failed)} checks failed"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
