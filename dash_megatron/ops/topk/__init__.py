"""What the top-k baselines, InfLLMv2 and NSA, share, and each of them."""
