"""The CPU backend: lowers a plan to the native executor (``csrc/cpu``)."""
