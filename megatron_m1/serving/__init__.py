"""`m1 serve` and `m1 generate`: a trained model of ours answers prompts."""
