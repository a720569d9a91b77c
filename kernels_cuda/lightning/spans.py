"""Lightning attention of some documents of a pack, into tensors that exist; and the states that runs of tokens leave.

What the ops of op.py and context parallelism (parallel/lasp.py) are made of: the kernels where they can serve the
operands, the chunked path elsewhere. No autograd. Arguments as in chunked.py.
"""

from __future__ import annotations

import torch

from kernels_cuda.lightning import chunked, sm90
from kernels_cuda.lightning.blocks import Span
from kernels_cuda.lightning.chunked import LaterState

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def scan_into(
    o: torch.Tensor,
    operands: Operands,
    slopes: torch.Tensor,
    state_in: torch.Tensor | None,
    spans: tuple[Span, ...],
    reverse: bool = False,
    scale: float = 1.0,
    state_out: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
) -> None:
    """Write the rows of o that lie in the spans, each a document of its own, their last states, and (chunked path
    only) the decayed scores that scan_backward_into may take."""
    if sm90.can_serve(*operands, o):
        sm90.scan_into(o, operands, slopes, state_in, spans, reverse, scale, state_out)
    else:
        chunked.scan_into(o, operands, slopes, state_in, spans, reverse, scale, state_out, scores)


def scan_backward_into(
    gradients: Operands,
    grad_o: torch.Tensor,
    later_state: LaterState,
    operands: Operands,
    slopes: torch.Tensor,
    state_in: torch.Tensor | None,
    spans: tuple[Span, ...],
    reverse: bool = False,
    scale: float = 1.0,
    last_state: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
) -> None:
    """Write the spans' rows of dq, then call later_state, then write those of dk and dv and the walk's last states."""
    arguments = gradients, grad_o, later_state, operands, slopes, state_in, spans, reverse, scale, last_state
    if sm90.can_serve(*operands, grad_o, *gradients):
        sm90.scan_backward_into(*arguments)
    else:
        chunked.scan_backward_into(*arguments, scores)


def leaving_states(
    k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor, spans: tuple[Span, ...], reverse: bool
) -> torch.Tensor:
    """The state [M, H, K, V] that each span adds to one that passes it in (reversed) time."""
    serve = sm90.leaving_states if sm90.can_serve(k, v) else chunked.leaving_states
    return serve(k, v, slopes, spans, reverse)
