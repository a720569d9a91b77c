"""A JSON header with many bytes behind it, from rank to rank over the default process group, in pieces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

_PIECE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Parcel:
    """What is sent."""

    header: dict[str, Any]
    payload: torch.Tensor
    """uint8 in host memory."""


def exchange(
    parcel: Parcel | None, to: int | None, sources: Sequence[int], device: torch.device
) -> list[Parcel]:
    """Send a parcel to one rank while one comes from each of the sources; only these ranks take part.

    device: where the process group wants its tensors. Memory there: a piece of 64 MiB per parcel.

    Returns: what came, in the order of `sources`.
    """
    header, payload = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)
    if parcel is not None:
        header = torch.frombuffer(bytearray(json.dumps(parcel.header).encode()), dtype=torch.uint8)
        payload = parcel.payload
    lengths = torch.tensor([header.numel(), payload.numel()]).view(torch.uint8)
    their_lengths = [torch.empty_like(lengths) for _ in sources]
    _move(lengths, to, their_lengths, sources, device)
    sizes = [received.view(torch.int64).tolist() for received in their_lengths]
    headers = [torch.empty(size, dtype=torch.uint8) for size, _ in sizes]
    _move(header, to, headers, sources, device)
    payloads = [torch.empty(size, dtype=torch.uint8) for _, size in sizes]
    _move(payload, to, payloads, sources, device)
    return [
        Parcel(json.loads(bytes(header.numpy())), payload)
        for header, payload in zip(headers, payloads, strict=True)
    ]


def _move(
    sent: torch.Tensor,
    to: int | None,
    received: Sequence[torch.Tensor],
    sources: Sequence[int],
    device: torch.device,
) -> None:
    """One tensor out, the others filled; both sides of a pair know the length."""
    longest = max([sent.numel() if to is not None else 0, *(target.numel() for target in received)])
    for start in range(0, longest, _PIECE_BYTES):
        operations, arriving = [], []
        piece = sent[start : start + _PIECE_BYTES]
        if to is not None and piece.numel():
            operations.append(dist.P2POp(dist.isend, piece.to(device), to))
        for target, source in zip(received, sources, strict=True):
            place = target[start : start + _PIECE_BYTES]
            if place.numel():
                buffer = torch.empty_like(place, device=device)
                operations.append(dist.P2POp(dist.irecv, buffer, source))
                arriving.append((place, buffer))
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        for place, buffer in arriving:
            place.copy_(buffer)
