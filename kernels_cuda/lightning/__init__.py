"""Lightning attention: decay slopes, the token recurrence, the chunked path, the ops, the CUDA kernels."""
