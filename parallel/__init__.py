"""Layouts, process groups, context parallelism and checkpoints: everything that knows about ranks."""
