"""GGUF file to Hugging Face directory (bf16 safetensors), for builders that read nothing else.

Runs in an environment with torch, transformers and gguf: ``gguf_to_hf.py FILE OUT``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def main(source: Path, out: Path) -> None:
    """Load through transformers' GGUF reader and save a plain Llama checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # A fresh config: the loaded one remembers that it was quantized.
    config = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    config |= {"dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}
    model: Any = LlamaForCausalLM(LlamaConfig(**config))
    model.to(torch.bfloat16)
    model.load_state_dict({name: value.to(torch.bfloat16) for name, value in loaded.state_dict().items()})
    model.tie_weights()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
