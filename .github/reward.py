"""Draws rl-tiny.png, the README's curve of rewards, from the record of a run: python .github/reward.py [RUN_DIR]."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_m1.rl.pictures import reward_picture  # noqa: E402

if __name__ == "__main__":
    run_dir = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs" / "rl-tiny"
    first, last = reward_picture(run_dir, ROOT / ".github" / "rl-tiny.png")
    print(f"share of right answers: {first:.2f} in the first batch, {last:.2f} at the end")
