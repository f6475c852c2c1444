"""Models: one file per architecture turns a configuration into a graph; ``load`` finds the weights."""
