"""Small calls of every MoE kernel, for compute-sanitizer: python -m kernels_cuda.bench.small_moe."""

from __future__ import annotations

import torch

from kernels_cuda.moe.op import grouped_mlp, moe_permute, moe_route, moe_sort, moe_unpermute


def run() -> None:
    """Ragged and empty experts, tails in rows, columns and depth, both kinds of weight gradient."""
    generator = torch.Generator("cuda").manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    for tokens, experts, width, ffn_width in ((90, 5, 136, 72), (300, 4, 328, 392), (1, 3, 64, 64)):
        x_TD, logits_TE = normal(tokens, width).bfloat16().requires_grad_(), normal(tokens, experts)
        logits_TE[:, 1] = -100
        logits_TE.requires_grad_()
        gate_up = normal(experts, 2, ffn_width, width).bfloat16().requires_grad_()
        down = normal(experts, width, ffn_width).bfloat16().requires_grad_()
        weights_TK, experts_TK = moe_route(logits_TE, 2)
        pair_of_row_R, row_of_pair_TK, counts_E = moe_sort(experts_TK, experts)
        x_RD = moe_permute(x_TD, pair_of_row_R, row_of_pair_TK)
        row_weights_R = weights_TK.flatten()[pair_of_row_R]
        buffers = torch.zeros(gate_up.shape, device="cuda"), torch.zeros(down.shape, device="cuda")
        for main_grads in ((), buffers):
            y_RD = grouped_mlp(x_RD, gate_up, down, counts_E, row_weights_R, *main_grads)
            out_TD = moe_unpermute(y_RD, pair_of_row_R, row_of_pair_TK)
            out_TD.sum().backward(retain_graph=True)
        results = (out_TD, x_TD.grad, logits_TE.grad, gate_up.grad, down.grad, *buffers)
        assert all(bool(torch.isfinite(result).all()) for result in results), (
            tokens,
            experts,
            width,
            ffn_width,
        )
    torch.cuda.synchronize()
    print("small MoE shapes: finite")


if __name__ == "__main__":
    run()
