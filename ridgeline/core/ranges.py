"""Named ranges of host time, for profilers: NVIDIA's (NVTX), or our own clocks.

What is traced wraps its methods only when it is asked to (``trace``): with no profiler there is nothing to skip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ridgeline.core.errors import ConfigError

Wrap = Callable[[str, Callable[..., Any]], Callable[..., Any]]
"""Of a range's name and what runs in it: the same, watched."""


class Ranges(Protocol):
    """Ranges, nested, of one thread."""

    def push(self, name: str) -> None:
        """A range begins."""
        ...

    def pop(self) -> None:
        """The innermost range ends."""
        ...


def within(ranges: Ranges) -> Wrap:
    """Wraps calls in ranges, which end whatever they raise."""

    def wrap(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def ranged(*args: Any, **more: Any) -> Any:
            ranges.push(name)
            try:
                return call(*args, **more)
            finally:
                ranges.pop()

        return ranged

    return wrap


def trace(wrap: Wrap, methods: Sequence[tuple[str, Any, str]]) -> Callable[[], None]:
    """Wraps methods of objects, given as (range, object, method), until what is returned is called."""
    before = [vars(owner).get(method) for _, owner, method in methods]
    for name, owner, method in methods:
        setattr(owner, method, wrap(name, getattr(owner, method)))

    def undo() -> None:
        for (_, owner, method), old in zip(methods, before, strict=True):
            if old is None:
                delattr(owner, method)  # the class's own is there again
            else:
                setattr(owner, method, old)  # in the ranges of who traced it before

    return undo


class NvtxRanges:
    """NVTX ranges in the domain ``ridgeline``. Raises ConfigError where the nvtx package is missing."""

    def __init__(self) -> None:
        try:
            import nvtx
        except ImportError:
            raise ConfigError("nvtx is not installed, which ranges are pushed with: pip install nvtx") from None
        self._domain = nvtx.get_domain("ridgeline")
        self._known: dict[str, Any] = {}

    def push(self, name: str) -> None:
        """See ``Ranges``."""
        attributes = self._known.get(name)
        if attributes is None:
            attributes = self._known[name] = self._domain.get_event_attributes(message=name)
        self._domain.push_range(attributes)

    def pop(self) -> None:
        """See ``Ranges``."""
        self._domain.pop_range()
