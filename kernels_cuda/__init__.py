"""Operators of MiniMax-M1-type models: CUDA for sm_90a, plain PyTorch on any other device.

Imports torch only: no torch.distributed, no megatron, nothing of the other packages.
"""
