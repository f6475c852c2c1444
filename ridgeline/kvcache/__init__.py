"""Who owns which block of the KV cache. Control plane: ints only, no tensors, no clock, no I/O."""
