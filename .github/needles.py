"""Draws needles.png: what share of hidden needles the run `long-tiny` finds after each of its stages.

`m1 data demo && m1 train long-tiny && python .github/needles.py runs/long-tiny`, from the repository root; every number
comes from the run directory, none from this file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_m1.config import load_run  # noqa: E402
from megatron_m1.longcontext.evaluate import NeedleGrid  # noqa: E402
from megatron_m1.longcontext.pictures import progress_picture  # noqa: E402
from megatron_m1.stages import stages_of  # noqa: E402


def draw(run_dir: Path, path: Path) -> None:
    """One heat map per stage of a finished run, side by side."""
    config = load_run(run_dir / "run.yaml")
    grids = []
    for stage in stages_of(config):
        found = json.loads((run_dir / "pictures" / f"needles-step_{stage.last.step:08d}.json").read_text())
        grid = NeedleGrid(
            lengths_L=tuple(found["lengths"]),
            depths_D=tuple(found["depths"]),
            found_LD=np.array(found["found"]),
            trials=config.long_context.needle_trials,
        )
        grids.append((stage.name, stage.config.training.sequence_length, grid))
    title = (
        f"{config.name}: needles found after each stage; hatched are texts longer than any it was trained on"
    )
    progress_picture(grids, title, path)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), ROOT / ".github" / "needles.png")
