"""Command-line flags generated from the fields of the option dataclasses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import typer

from ridgeline.core.config import EngineConfig
from ridgeline.core.types import SamplingParams

_SAMPLING_HELP = {
    "temperature": "divides the logits; 0 is greedy",
    "top_k": "keep the k most likely tokens; 0 keeps all",
    "top_p": "keep the smallest set of tokens with this probability",
    "min_p": "drop tokens below this share of the most likely one's probability",
    "stop": "end the text before this string (may be given several times)",
    "ignore_eos": "go on past the end-of-text token",
}
_ENGINE, _SAMPLING = "Engine", "Sampling"


def with_flags(command: Callable[..., None], *, sampling: bool) -> Callable[..., None]:
    """``command(..., engine, params)`` as a function whose signature has a flag for each option field.

    ``engine`` receives the EngineConfig fields but ``model`` as a dict, ``params`` the SamplingParams fields that
    have a flag (only with ``sampling``). ``--seed`` is the engine's: it draws every request's seed.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name not in ("engine", "params")]
    taken = {"model"} | {p.name for p in own}  # a command's own flag stands for the engine's of that name
    flags = [
        _flag(f.name, hint, f.default, f.metadata["help"], f.metadata["choices"], _ENGINE)
        for f, hint in _typed_fields(EngineConfig)
        if f.name not in taken
    ]
    engine_names = [p.name for p in flags]
    if sampling:
        hints = {f.name: (f, hint) for f, hint in _typed_fields(SamplingParams)}
        for name, text in _SAMPLING_HELP.items():
            field, hint = hints[name]
            flags.append(_flag(name, hint, field.default, text, (), _SAMPLING))

    def run(**values: Any) -> None:
        given = {p.name: values[p.name] for p in own}
        engine = {name: values[name] for name in engine_names}
        if sampling:
            given["params"] = {name: values[name] for name in _SAMPLING_HELP}
        command(**given, engine=engine)

    run.__doc__ = command.__doc__
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *flags)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _typed_fields(owner: type[Any]) -> list[tuple[Any, Any]]:
    hints = get_type_hints(owner)
    return [(f, hints[f.name]) for f in fields(owner)]


def _flag(name: str, hint: Any, default: Any, text: str, choices: tuple[str, ...], panel: str) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    if hint is bool and default is True:
        flag += "/--no" + flag[1:]
    if choices:
        text += f" ({', '.join(choices)})"
    if hint == tuple[str, ...]:
        hint, default = list[str], list(default)
    option = typer.Option(flag, help=text, rich_help_panel=panel, show_default=default not in (None, [], False))
    annotation = Annotated[hint, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
