"""Measurements on a GPU: one command per table of BENCHMARKS.md. Nothing here is imported by the operators."""
