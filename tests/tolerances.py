"""How close results must be, in one place. Every number is a relative error unless its name says otherwise."""

# fp32 layouts against one process: sums in another order
LOSS = 1e-5
GRADIENT_RMS = 1e-4
WEIGHT_RMS = 1e-4
# the logits of the transformers oracle, absolute
ORACLE_LOGITS = 1e-4
# bf16 kernels against fp64, per head, relative RMS
BF16_OUTPUT_RMS = 5e-3
BF16_STATE_RMS = 3e-3
