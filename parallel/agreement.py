"""Errors that all ranks share: an error on one rank becomes the same error on every rank.

Without this a rank that raises leaves the others waiting in their next collective. Every method is
collective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")


class Agreement:
    """Runs local work so that all ranks of the job go on, or all raise `error_class` with the same message."""

    def __init__(
        self,
        device: torch.device,
        error_class: type[Exception],
        describe: Callable[[Exception], str],
    ) -> None:
        """device: where small collectives of the default group run. describe: an error's complete message."""
        self._device = device
        self._error_class = error_class
        self._describe = describe

    def any(self, *conditions: bool) -> list[bool]:
        """For each condition, whether it holds on any rank."""
        flags = torch.tensor(conditions, dtype=torch.int32, device=self._device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in flags.tolist()]

    def sum(self, number: int) -> int:
        """The sum of a number over all ranks."""
        total = torch.tensor([number], dtype=torch.int64, device=self._device)
        dist.all_reduce(total)
        return int(total)

    def raise_if_any(self, problem: str, cause: Exception | None = None) -> None:
        """Raise the problem of the lowest rank that has one; go on when it is empty everywhere."""
        if not self.any(bool(problem))[0]:
            return
        problems: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        raise self._error_class(next(text for text in problems if text)) from cause

    def everywhere(self, action: Callable[[], Result]) -> Result:
        """Run local work on every rank; each rank's own result."""
        outcome: list[Result] = []
        problem, cause = "", None
        try:
            outcome.append(action())
        except Exception as error:  # whatever it is, the other ranks must not wait for this one
            problem, cause = self._describe(error), error
        self.raise_if_any(problem, cause)
        return outcome[0]

    def on_first_rank(self, action: Callable[[], Result]) -> Result:
        """Run local work on rank 0 only; its result on every rank."""
        first = dist.get_rank() == 0
        shared = [self.everywhere(action if first else lambda: None)]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]  # type: ignore[return-value]
