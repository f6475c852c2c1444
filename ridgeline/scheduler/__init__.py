"""Which tokens are computed next. Control plane: ints only, no tensors, no clock, no I/O, no randomness."""
