"""jinja2 with its hands tied, for templates that came with a downloaded file.

The environment is transformers' (block trimming, loop controls, ``tojson``, ``raise_exception``,
``strftime_now``, ``{% generation %}``) over jinja2's immutable sandbox, plus bounds on what a
few characters of template can cost: turns of loops and calls, sizes of strings and numbers it builds. They stop the
obvious ways to exhaust time and memory, not a determined author: run models you trust as far as their template.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Environment, Template, TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ridgeline.core.errors import ModelFileError, RequestError

MAX_LOOP = 100_000  # numbers of one range
MAX_STEPS = 1_000_000  # turns of all loops, and calls, of one rendering
STEPS = "steps taken"  # a variable that no template can name: holds a list of one number
MAX_STRING = 1 << 24
MAX_POWER_BITS = 1 << 12


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's text for training; for inference it is its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Has every loop go through the filter that counts its turns. This method is jinja2's own, for there is no
        other way to a template's tree; a test sees that it is called."""
        template = super()._parse(source, name, filename)
        for loop in template.find_all(nodes.For):
            counted = nodes.Filter(loop.iter, "counted", [], [], None, None)
            loop.iter = counted.set_lineno(loop.lineno).set_environment(self)
        return template

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operators that can build something enormous, refused before they do."""
        if operator == "*":
            _check_repeat(left, right)
            _check_repeat(right, left)
        elif operator == "+" and isinstance(left, (str, list)) and isinstance(right, type(left)):
            _check_size(len(left) + len(right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * max(right, 0) > MAX_POWER_BITS:
                raise SecurityError("the template computes too large a number")
        elif operator == "%" and isinstance(left, str) and _has_wide_field(left):
            raise SecurityError("the template formats too wide a field")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call is a step; string methods that pad take a width, bounded like everything else."""
        _step(context)
        if isinstance(obj, LoopContext) and args:  # of a recursive loop: starts the next level
            args = (_counted(context, args[0]), *args[1:])
        obj_method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        if getattr(obj, "__name__", "") in ("ljust", "rjust", "center", "zfill", "expandtabs"):
            for width in args:
                if isinstance(width, int):
                    _check_size(width)
        elif getattr(obj, "__name__", "") == "format" and isinstance(getattr(obj_method, "__self__", None), str):
            if _has_wide_field(obj_method.__self__):
                raise SecurityError("the template formats too wide a field")
        return super().call(context, obj, *args, **kwargs)


def _step(context: Context, number: int = 1) -> None:
    steps = context.parent[STEPS]
    steps[0] += number
    if steps[0] > MAX_STEPS:
        raise SecurityError(f"the template takes more than {MAX_STEPS} steps")


@pass_context
def _counted(context: Context, values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _step(context)
        yield value


def _check_size(size: int, most: int = MAX_STRING) -> None:
    if size > most:
        raise SecurityError(f"the template builds something larger than {most} characters or items")


def _check_repeat(what: Any, times: Any) -> None:
    if isinstance(what, (str, list, tuple)) and isinstance(times, int):
        _check_size(len(what) * max(times, 0), MAX_STRING if isinstance(what, str) else MAX_LOOP)


def _has_wide_field(text: str) -> bool:
    """Whether a format string holds a number of five digits or more, or takes its width from an argument."""
    run = 0
    for char in text:
        run = run + 1 if char.isdigit() else 0
        if run > 4:
            return True
    return "*" in text


def _bounded_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose numbers (widths, counts) and format strings are bounded."""

    @functools.wraps(function)  # keeps the mark by which jinja2 passes the environment
    def checked(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, int) and value > MAX_LOOP:
                raise SecurityError(f"the template asks a filter for more than {MAX_LOOP}")
        if function.__name__ == "do_format" and _has_wide_field(str(args[0])):
            raise SecurityError("the template formats too wide a field")
        return function(*args, **kwargs)

    return checked


@pass_context
def _range(context: Context, *bounds: int) -> Sequence[int]:
    values = range(*bounds)
    if len(values) > MAX_LOOP:
        raise SecurityError(f"the template loops over more than {MAX_LOOP} numbers")
    _step(context, len(values))  # filters go over it as well
    return values


def _raise_exception(message: str) -> None:
    raise RequestError(f"the model's chat template refuses the messages: {' '.join(str(message).split())}")


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON without the HTML escapes of jinja2's own filter: the text is for a model, not for a browser."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def compile_template(source: str) -> Template:
    """Compile a chat template; raises ModelFileError with the line when its syntax is wrong."""
    environment: Environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    for name in ("batch", "center", "format", "indent", "slice", "wordwrap"):
        environment.filters[name] = _bounded_filter(environment.filters[name])
    environment.filters |= {"tojson": _tojson, "counted": _counted}
    environment.globals.update(range=_range, raise_exception=_raise_exception, strftime_now=_strftime_now)
    for name in ("lipsum", "cycler", "joiner"):
        environment.globals.pop(name, None)
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise ModelFileError(f"tokenizer.chat_template is broken at line {error.lineno}: {error.message}") from None
    except (TemplateError, RecursionError) as error:
        raise ModelFileError(f"tokenizer.chat_template does not compile: {type(error).__name__}") from None
