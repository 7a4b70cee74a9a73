"""Within which limits instances get the other role by themselves."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .instances import StrictModel

_Least = Annotated[int, Field(ge=1)]


class TurningConfig(StrictModel):
    """Limits within which instances [turn by themselves](ratio.md#by-itself); `{}`: those below."""

    min_prefill: _Least = 1
    """P that stay, those that can serve."""
    min_decode: _Least = 1
    """D that stay, likewise."""
    interval: Annotated[float, Field(ge=30.0, le=3600.0)] = 60.0
    """Seconds from one look to the next. An advice is asked for at each."""
    minutes: Annotated[float, Field(ge=1.0, le=15.0)] = 3.0
    """Of traffic that each looks at, the newest."""
    looks: Annotated[int, Field(ge=1, le=100)] = 2
    """So many looks one after the other must advise the same move before one is made."""
    gain: Annotated[float, Field(ge=1.0, le=100.0)] = 2.0
    """What the move must promise each time, in multiples of what makes a move worth advising."""
    pause: Annotated[float, Field(ge=0.0, le=86_400.0)] = 300.0
    """Seconds after a turn in which none goes back, and after an operator has changed the fleet in which none
    begins. Another turn of the same kind may follow at the next look."""
