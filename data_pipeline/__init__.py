"""From text to packed samples: shards, tokenizer, mixing, packing and loaders; knows ranks only as integers."""
