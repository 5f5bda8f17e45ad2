"""Long-context evaluation of runs and exported models: loss by position and document, needles, RULER families, recall, copy."""
