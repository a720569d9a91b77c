"""What is measured of a model in training besides its loss: how it uses long contexts, as numbers and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_pipeline.needle_rows import NeedleRows
from megatron_m1.longcontext.evaluate import NeedleGrid, find_needles, loss_by_position
from megatron_m1.stages import Stage
from megatron_m1.training.batch import Row
from parallel.groups import Groups


class Measures:
    """Measures at the end of a stage and in between; pictures and their numbers lie in the run directory."""

    def __init__(
        self,
        stage: Stage,
        groups: Groups,
        chunks: Sequence[Any],
        held_out: Callable[[Sequence[int]], Sequence[Row]],
        report: Callable[[int, dict[str, float]], None],
        keep: Callable[[int, Path], None],
    ) -> None:
        """Open what the stage measures.

        Args:
            stage: that trains.
            groups: process groups.
            chunks: this rank's model chunks, wrapped or not.
            held_out: held-out rows by number.
            report: takes a step and the numbers measured there.
            keep: takes a step and a file to store with the run; called on one rank.
        """
        self._stage, self._groups, self._chunks = stage, groups, chunks
        self._config = stage.config.long_context
        self._held_out, self._report, self._keep = held_out, report, keep
        self._needles = (
            NeedleRows(stage.data.open_tokenizer(), stage.config.seed, self._config.multi_needles)
            if self._config.needle_lengths
            else None
        )

    def after_step(self, step: int) -> None:
        """Measure if it is time; collective."""
        every = self._config.every_steps
        if step == self._stage.last.step or (every and step % every == 0):
            numbers = self._find_needles(step) | self._find_spread_needles(step) | self._losses(step)
            if numbers:
                self._report(step, numbers)

    def _find_needles(self, step: int) -> dict[str, float]:
        if self._needles is None:
            return {}
        grid = find_needles(self._chunks, self._groups, self._config, self._needles.make)
        return self._show(step, grid, "needles", "needles found")

    def _find_spread_needles(self, step: int) -> dict[str, float]:
        """Several needles in each text: every one of them is a depth of the grid."""
        count = self._config.multi_needles
        if self._needles is None or not count:
            return {}
        config = replace(self._config, needle_depths=count)
        grid = find_needles(self._chunks, self._groups, config, self._needles.make_spread)
        return self._show(step, grid, "multi_needles", f"{count} needles in each text, found")

    def _show(self, step: int, grid: NeedleGrid, name: str, what: str) -> dict[str, float]:
        """Picture and numbers of a grid; its metrics."""
        if dist.get_rank() == 0:
            from megatron_m1.longcontext.pictures import needle_picture

            path = self._pictures / f"{name}-step_{step:08d}.png"
            needle_picture(grid, f"stage {self._stage.name}, step {step}: {what}", path)
            self._write(
                step,
                path,
                {"lengths": grid.lengths_L, "depths": grid.depths_D, "found": grid.found_LD.tolist()},
            )
        by_length = zip(grid.lengths_L, grid.found_LD.mean(1), strict=True)
        return {f"{name}_found_{length}": float(share) for length, share in by_length}

    def _losses(self, step: int) -> dict[str, float]:
        count = self._config.position_rows
        if not count:
            return {}
        curve = loss_by_position(self._chunks, self._groups, self._held_out(range(count)))
        if dist.get_rank() == 0:
            from megatron_m1.longcontext.pictures import position_picture

            path = self._pictures / f"positions-step_{step:08d}.png"
            position_picture({f"stage {self._stage.name}, step {step}": curve}, path)
            losses = [None if math.isnan(loss) else loss for loss in curve.loss_nats.tolist()]
            self._write(step, path, {"borders": curve.borders, "loss_nats": losses})
        longest = [loss for loss, tokens in zip(curve.loss_nats, curve.tokens, strict=True) if tokens][-1]
        return {"loss_at_longest_positions_nats": float(longest)}

    @property
    def _pictures(self) -> Path:
        return self._stage.config.run_dir / "pictures"

    def _write(self, step: int, picture: Path, values: dict[str, Any]) -> None:
        """Write the numbers beside their picture, and store both with the run."""
        numbers = picture.with_suffix(".json")
        numbers.write_text(json.dumps(values, allow_nan=False) + "\n", encoding="utf-8")
        for file in (picture, numbers):
            self._keep(step, file)
