"""Every error a user can meet. Each message names what is wrong and what to do about it."""

from __future__ import annotations


class RidgelineError(Exception):
    """Base of all errors raised on purpose; the command line prints it as one line."""


class ModelFileError(RidgelineError):
    """A model file is missing, truncated, misshapen or lies about itself."""


class UnsupportedError(RidgelineError):
    """A requested feature, architecture or tensor type that this build does not honour."""


class RequestError(RidgelineError, ValueError):
    """A request that can never be served: empty or too long a prompt, bad sampling parameters."""


class QueueFullError(RequestError):
    """A request that would be served, were not so many waiting already: send it again later."""


class ConfigError(RidgelineError, ValueError):
    """An engine option with a value that cannot work."""


class EngineDeadError(RidgelineError):
    """An engine that has failed or was closed while it ran this request; it serves none any more."""


class SlowReaderError(RidgelineError):
    """A stream that was dropped because its reader left too much of it unread."""


class ForkedError(RidgelineError):
    """A loaded model in a fork of the process that loaded it: its threads and who held its locks stayed behind."""

    def __init__(self) -> None:
        super().__init__("this model was loaded before the process forked: load it in the child")
