"""Counts and logs what code that is not ours raises: strategies and connectors of the operator's."""

from __future__ import annotations

import logging
import time
import traceback
from collections import Counter
from collections.abc import Callable

from .pace import Pace

log = logging.getLogger(__name__)

_MAX_MESSAGE = 200
"""Characters of an exception that are logged."""
_OURS = __name__.partition(".")[0]


class Failures:
    """The failures of one kind of code, by two labels of their metric.

    ``what`` says in the log what has failed, with a ``%s`` for each label, and ``instead`` what happens in
    its place. ``clock`` returns monotonic seconds.
    """

    def __init__(self, what: str, instead: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self._what = what
        self._instead = instead
        self._pace = Pace(clock)

    def expect(self, first: str, second: str) -> None:
        """Let the count with these labels exist from now on, so that ``rate()`` has a first value."""
        self.counts[first, second] += 0

    def add(self, first: str, second: str, code: object, error: Exception) -> None:
        """Count what ``code`` has raised. Log it, at most once a minute for each pair of labels."""
        labels = first, second
        self.counts[labels] += 1
        if not self._pace.due(labels):
            return
        log.error(
            "%s: %s. %s (%d so far, logged at most once a minute).",
            self._what % labels,
            described(error, code),
            self._instead,
            self.counts[labels],
            exc_info=error if log.isEnabledFor(logging.DEBUG) else None,
        )


def described(error: Exception, code: object) -> str:
    """Return an exception in one line, with the last place in the module of ``code`` that it came through.

    ``code`` is an object or a class.
    """
    # Not str(error), which is code of others too.
    text = " ".join("".join(traceback.format_exception_only(error)).split())[:_MAX_MESSAGE]
    made_by = code if isinstance(code, type) else type(code)
    own = {cls.__module__ for cls in made_by.__mro__ if cls.__module__.partition(".")[0] != _OURS}
    places = [
        f"{frame.f_code.co_filename}:{line} in {frame.f_code.co_name}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__") in own
    ]
    return f"{text}, at {places[-1]}" if places else text


def why_not_made(code: type, error: Exception) -> str:
    """Return why there can be no object of a class: what it has to define, or what it has raised."""
    missing = sorted(getattr(code, "__abstractmethods__", ()))
    return f"it lacks {', '.join(missing)}" if missing else described(error, code)
