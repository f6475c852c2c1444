"""Readers of model files and the codecs of their weight formats.

``from ridgeline.weights.gguf import open_gguf`` reads a GGUF file; ``WeightTensor`` is what every
reader yields: the bytes as they lie in the file and how to understand them.
``awq`` and ``gptq`` take the tensors of such checkpoints apart into codes, scales and zeros.
"""
