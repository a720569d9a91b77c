"""What is kept between forward and backward, and where: layers computed twice, or activations in host memory.

Recomputed layers keep their input alone, and no bit of a result changes. Offloaded activations are copied to pinned
host memory while later layers compute, and fetched back while the layer behind them in backward computes; they come
back contiguous, so a kernel that read a strided view may add in another order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch

from megatron_m1.model.config import LayerKind

Recompute = Literal["none", "lightning", "softmax", "full"]
"""Which layers are computed again in backward: none, one kind, or all."""
LOGITS_MIB = 1024
"""Default for the logits that exist at once: 8,192 tokens of a vocabulary share of 32,768 are one chunk."""

_SMALLEST_BYTES = 2**20
"""Smaller tensors stay on the device: a copy costs more than it frees."""
_AHEAD_BYTES = 256 * 2**20
"""Fetched ahead of backward, at least the next tensor."""


def is_recomputed(recompute: Recompute, kind: LayerKind) -> bool:
    """Whether layers of a kind keep their input alone."""
    return recompute in ("full", kind)


class HostCopies(AbstractContextManager):
    """Inside, what autograd saves for backward goes to host memory; weights and small tensors stay.

    May be entered again and again, once per layer; backward happens outside. On a CPU the copies are ordinary memory.

    Args:
        weights: the tensors that live on the device anyway.
        device: where the model is.
    """

    def __init__(self, weights: Callable[[], Iterator[torch.Tensor]], device: torch.device) -> None:
        self._weights, self._device = weights, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._stay: set[int] = set()
        self._last: weakref.ref[_HostCopy] | None = None
        self._hooks: AbstractContextManager = self
        self.copied_bytes = 0
        """Bytes copied since this object was made."""

    def __enter__(self) -> HostCopies:
        self._stay = {weight.untyped_storage().data_ptr() for weight in self._weights()}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, x: torch.Tensor) -> torch.Tensor | _HostCopy:
        num_bytes = x.numel() * x.element_size()
        if num_bytes < _SMALLEST_BYTES or x.untyped_storage().data_ptr() in self._stay:
            return x
        self.copied_bytes += num_bytes
        copy = _HostCopy(x, self._last, self)
        self._last = weakref.ref(copy)
        return copy

    def _unpack(self, kept: torch.Tensor | _HostCopy) -> torch.Tensor:
        return kept if isinstance(kept, torch.Tensor) else kept.take_back()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Queue copies beside the computation, after what it has queued so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def await_aside(self, x: torch.Tensor) -> None:
        """Let the computation wait until x, made aside, is complete."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            x.record_stream(current)

    def lend_aside(self, x: torch.Tensor) -> None:
        """Keep x's memory until what is queued aside has read it."""
        if self._stream is not None:
            x.record_stream(self._stream)


class _HostCopy:
    """One saved tensor in host memory, and the one saved before it, which backward needs after it."""

    def __init__(self, x: torch.Tensor, before: weakref.ref[_HostCopy] | None, place: HostCopies) -> None:
        self._before, self._place, self._device = before, place, x.device
        self._fetched: torch.Tensor | None = None
        self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        with place.aside():
            self._host.copy_(x, non_blocking=True)
        place.lend_aside(x)

    def take_back(self) -> torch.Tensor:
        """The tensor on its device; those that backward needs next begin to travel."""
        x = self._fetch()
        self._place.await_aside(x)
        self._fetched = None
        ahead, copy = 0, self._previous()
        while copy is not None and ahead < _AHEAD_BYTES:
            ahead += copy._fetch().nbytes
            copy = copy._previous()
        return x

    def _previous(self) -> _HostCopy | None:
        return self._before() if self._before else None

    def _fetch(self) -> torch.Tensor:
        if self._fetched is None:
            with self._place.aside():
                self._fetched = self._host.to(self._device, non_blocking=True, copy=True)
        return self._fetched
