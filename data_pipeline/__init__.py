"""From text to packed samples: shards, tokenizer, mixing, packing, loaders. Ranks are two integers here."""
