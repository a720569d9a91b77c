"""Small calls of every lightning kernel, for compute-sanitizer: python -m kernels_cuda.bench.small_lightning."""

from __future__ import annotations

import torch

from kernels_cuda.lightning.op import lightning_attention, lightning_decode


def run() -> None:
    """Head dims 64 and 128, ragged documents, states, both directions of time, segments, decode."""
    for head_dim, num_heads, borders in (
        (64, 3, (0, 1, 64, 200)),
        (128, 2, (0, 65, 65, 200)),
        (128, 1, (0, 1200)),
    ):
        qkv = torch.randn(borders[-1], num_heads, 3 * head_dim, device="cuda", dtype=torch.bfloat16)
        q, k, v = (x.requires_grad_() for x in qkv.split(head_dim, dim=-1))
        slopes = torch.linspace(0.01, 1.0, num_heads, device="cuda")
        cu_seqlens = torch.tensor(borders, dtype=torch.int32, device="cuda")
        state = torch.randn(
            len(borders) - 1, num_heads, head_dim, head_dim, device="cuda", requires_grad=True
        )
        o, state_out = lightning_attention(q, k, v, slopes, state, cu_seqlens)
        gradients = torch.autograd.grad([o.sum() + state_out.sum()], [q, k, v, state])
        assert all(bool(torch.isfinite(x).all()) for x in (o, state_out, *gradients)), (head_dim, borders)
        lightning_decode(
            q.detach(),
            k.detach(),
            v.detach(),
            slopes,
            torch.zeros(borders[-1], *state.shape[1:], device="cuda"),
        )
    torch.cuda.synchronize()
    print("small lightning shapes: finite")


if __name__ == "__main__":
    run()
