"""The command line's entry point: exit codes, and one line for each error."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from ridgeline.core.errors import ConfigError, RidgelineError

USAGE, FAILURE, INTERRUPTED = 2, 1, 130


def main() -> NoReturn:
    """Run the command line: exit code 0, 1 (failure), 2 (usage) or 130 (interrupt), errors as one line each."""
    _replace_closed_streams()
    if sys.stdout is None:
        _leave(_complain("standard output is closed: nobody could read the result", FAILURE))
    try:
        code = _run_app()
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone
        _leave(FAILURE)
    except RidgelineError as error:
        code = _complain(_with_notes(error), USAGE if isinstance(error, ConfigError) else FAILURE)
    except (OSError, UnicodeError, MemoryError, OverflowError) as error:  # the machine's, not a bug's: no traceback
        code = _complain(str(error) or type(error).__name__, FAILURE)
    if code == INTERRUPTED:  # a terminal shows ^C in the middle of the text
        print("\ninterrupted" if sys.stderr.isatty() else "interrupted", file=sys.stderr)
    if code:
        _leave(code)
    sys.exit(code)


def _replace_closed_streams() -> None:
    """Stand in for an input and an error stream that were closed before the start."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")


def _complain(message: str, code: int) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return code


def _with_notes(error: BaseException) -> str:
    """An error's message with what was added to it on its way, such as where its flight record is."""
    return "; ".join([str(error), *getattr(error, "__notes__", [])])


def _leave(code: int) -> NoReturn:
    """Exit at once: threads may still be packing weights, and nothing needs their result."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            pass
    os._exit(code)


def _run_app() -> int:
    from ridgeline.api.commands import make_command  # imports take time, and may be interrupted

    try:
        return make_command()(prog_name="ridgeline", standalone_mode=False) or 0
    except Exception as error:
        explain = getattr(error, "format_message", None)  # only a usage error has it
        if explain is None:
            raise
        return _complain(f"{str(explain()).rstrip('.')}: see ridgeline --help", USAGE)
