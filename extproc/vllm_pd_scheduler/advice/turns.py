"""When an instance is turned without an operator: what is asked of one advice after another."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..config.turning import TurningConfig
from ..models import PD_ROLES, InstanceRole
from .verdict import Advice, Kind


class Turns:
    """Waits until the same move was advised often enough, and long enough after the last one.

    A move is advised by replaying the traffic on the fleet as it is, so the next one of the same kind need
    not wait until the last one has shown its effect. One back has to wait for ``pause``, so that a load that
    swings does not have instances drain for nothing.
    """

    def __init__(self) -> None:
        self.looks = 0
        """How often the same move was advised, one look after the other."""
        self._wanted: InstanceRole | None = None
        self._not_before = dict.fromkeys(PD_ROLES, -math.inf)
        """Until when no instance of a role is turned."""

    def looked(self, advice: Advice, limits: TurningConfig, now: float) -> InstanceRole | None:
        """Take the next advice; return the role of which one instance is to be turned, if one is."""
        wanted = advice.from_role if advice.kind is Kind.MOVE and advice.gain >= limits.gain else None
        if wanted is not self._wanted:
            self._wanted, self.looks = wanted, 0
        if wanted is None:
            return None
        self.looks += 1
        return wanted if self.looks >= limits.looks and now >= self._not_before[wanted] else None

    def turned(self, role: InstanceRole, now: float, seconds: float) -> None:
        """Note that an instance of a role has the other one: let none go back for so long."""
        self._wait((each for each in PD_ROLES if each is not role), now + seconds)

    def pause(self, now: float, seconds: float) -> None:
        """Let none begin for so long, and begin to look anew."""
        self._wanted, self.looks = None, 0
        self._wait(PD_ROLES, now + seconds)

    def _wait(self, roles: Iterable[InstanceRole], until: float) -> None:
        for role in roles:
            self._not_before[role] = max(self._not_before[role], until)
