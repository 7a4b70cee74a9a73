"""Why a request to an instance has no answer."""

from __future__ import annotations


class RequestFailed(Exception):
    """A request has no answer; ``args[0]`` says why, for people.

    ``cause`` is what the operating system or TLS said, if that was the reason.
    """

    def __init__(self, words: str, cause: BaseException | None = None) -> None:
        super().__init__(words)
        self.cause = cause


class NotConnected(RequestFailed):
    """No connection was made: nothing of the request was sent."""


class ConnectionLost(RequestFailed):
    """The connection ended after the request was sent, and before the answer was whole."""


class NotHttp(ConnectionLost):
    """What came is no HTTP that can be read, so the connection had to be ended."""


class AnswerRefused(RequestFailed):
    """The answer is larger than it may be, or compressed, which nobody asked for."""


class GivenUp(RequestFailed):
    """Its instance was found to hang."""


class TimedOut(RequestFailed, TimeoutError):
    """The answer was not whole in time."""
