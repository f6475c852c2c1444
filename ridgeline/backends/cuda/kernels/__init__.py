"""GPU kernels, one file per operator: kernel, closed configuration table, launcher.

A launcher is a pure function from tensors and a target to a list of ``Launch``: it allocates nothing and runs
nothing, so that the same list is interpreted, compiled without a driver, captured into a CUDA graph or timed.
"""
