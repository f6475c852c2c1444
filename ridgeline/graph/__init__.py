"""The compiler: a model's graph, the passes that fuse it, and the plan a backend runs."""
