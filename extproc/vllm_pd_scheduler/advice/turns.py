"""When an instance is turned without an operator: what is asked of one advice after another."""

from __future__ import annotations

import math

from ..config.turning import TurningConfig
from ..models import InstanceRole
from .verdict import Advice, Kind


class Turns:
    """Waits until the same move was advised often enough, and long enough after the last one."""

    def __init__(self) -> None:
        self._wanted: InstanceRole | None = None
        self._looks = 0
        self._not_before = -math.inf

    def looked(self, advice: Advice, limits: TurningConfig, now: float) -> InstanceRole | None:
        """Take the next advice; return the role of which one instance is to be turned, if one is."""
        wanted = advice.from_role if advice.kind is Kind.MOVE and advice.gain >= limits.gain else None
        if wanted is None or wanted is not self._wanted:
            self._looks = 0
        self._wanted = wanted
        self._looks += wanted is not None
        return wanted if self._looks >= limits.looks and now >= self._not_before else None

    def pause(self, now: float, seconds: float) -> None:
        """Let none begin for so long, and begin to look anew."""
        self._wanted, self._looks = None, 0
        self._not_before = max(self._not_before, now + seconds)
