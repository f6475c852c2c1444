"""The truth for every operator and for sampling, in numpy: clear, not fast."""
