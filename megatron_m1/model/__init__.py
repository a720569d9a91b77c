"""The network: layers, their numerics, and how megatron-core assembles them."""
