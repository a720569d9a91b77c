"""`python -m megatron_m1` is `m1`.

The guard matters: a checkpoint save starts processes that import this file again.
"""

from megatron_m1.cli import main

if __name__ == "__main__":
    main()
