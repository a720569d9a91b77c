"""Looks after one stage of a run behind a jump to longer rows: measures its gradients and says when it ends for them.

What an explosion is stands in longcontext/jump.py, what the run does about it in insertion.py.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_m1.longcontext.jump import Explosion, JumpWatch
from megatron_m1.report import Report
from megatron_m1.stages import Stage
from megatron_m1.training.gradient_parts import GradientParts
from megatron_m1.training.metrics import StepMetrics


class JumpGuard:
    """One per stage, on every rank."""

    def __init__(self, stage: Stage, parts: GradientParts, saved: dict[str, Any] | None) -> None:
        """Start to look.

        Args:
            stage: that trains.
            parts: measures the gradients of its model.
            saved: `watch.state` in the checkpoint that the stage begins with or goes on from; None at a fresh start.
        """
        policy, lengths = stage.config.length_jump, stage.sequence_lengths
        # a stage of kind rl is the last one and has no rows
        trains = stage.kind == "train"
        is_jump = trains and stage.index > 0 and lengths[stage.index] > lengths[stage.index - 1]
        self.watch = JumpWatch(policy, stage.name, parts.names, is_jump=is_jump, saved=saved)
        self.explosion: Explosion | None = None
        """What ended the stage, None while nothing has."""
        # the mixes of a run without stages have one length
        self._is_on = policy.sigmas > 0 and len(set(lengths)) > 1
        self.goes_back_to = stage.first.step if is_jump and self._is_on else None
        """Step whose checkpoint the run needs as long as the stage may explode."""
        self._policy, self._stage, self._parts = policy, stage, parts
        self._norms: list[float] = []
        self._is_reported = False

    def measure(self) -> None:
        """Measure the gradients of a step, before they are clipped; collective."""
        if self._is_on:
            self._norms = self._parts.norms()

    def saw(self, metrics: StepMetrics, report: Report) -> bool:
        """Look at the step just taken, the same numbers on every rank; whether the stage ends here.

        Args:
            metrics: of the step.
            report: gets the picture, and the sentences where nothing else is done.
        """
        if not self._is_on or self._is_reported:
            return False
        assert metrics.grad_norm is not None, metrics
        was_made = not metrics.extra["update_refused"]
        explosion = self.watch.saw(metrics.step, metrics.grad_norm, self._norms, was_made=was_made)
        if explosion is None:
            return False
        if dist.get_rank() == 0:
            from megatron_m1.longcontext.pictures import growth_picture

            path = self._stage.config.run_dir / "pictures" / f"jump-step_{metrics.step:08d}.png"
            growth_picture(explosion, f"stage {self._stage.name}, step {metrics.step}", path)
            report.keep(metrics.step, path)
        if self._policy.answer == "report":
            self._is_reported = True
            for sentence in explosion.sentences():
                report.say(sentence)
            return False
        self.explosion = explosion
        return True
