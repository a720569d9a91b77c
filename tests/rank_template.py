"""What every rank of a test has before it begins: imported once, then forked (see tests/spawn.py).

It must start no thread and open no socket: a forked child has neither.
"""

import torch

import megatron_m1.run  # noqa: F401
from parallel import cpu

torch.set_num_threads(1)
cpu.install()
