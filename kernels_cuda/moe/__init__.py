"""Mixture-of-experts operators: routing, stable permutation, and the grouped SwiGLU MLP."""
