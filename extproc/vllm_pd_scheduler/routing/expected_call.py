"""The call by which the D of a request asks for its prefill, as those see it who have the request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class ExpectedCall:
    """What is known of one; ``on_end`` is called when it is of no use any more."""

    on_end: Callable[[], None]
    known: bool = False
    """Whether it has come, and the P that the request names has done the prefill."""
    refused: bool = False
    """Whether the client was given an error, since P has failed: no fault of D's."""
    ended: bool = False

    def end(self) -> None:
        """Note that D's answer has ended, or D has failed. Doing it twice is the same as once."""
        if not self.ended:
            self.ended = True
            self.on_end()
