"""Long-context evaluation of runs and exported models: perplexity by position, needles, RULER families, recall, copy."""
