"""The training loop and what serves it: step, loss, optimizer, schedule, metrics, tracking."""
