"""What the headers of an answer tell that passes through the scheduler."""

from __future__ import annotations

from typing import NamedTuple


class AnswerHead(NamedTuple):
    """The headers of an answer, as far as they matter here."""

    status: int
    served: str = ""
    """``ip:port`` of the instance that has answered, if the gateway tells."""
    own: bool = False
    """Whether the gateway has written the answer itself, as far as can be seen."""
    attempts: int = 1
    """How often the gateway has sent the request, if it tells."""
    retry_after: float | None = None
