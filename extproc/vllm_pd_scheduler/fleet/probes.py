"""What health probes say of an endpoint."""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import force_setattr as _set


class Probes(Struct, frozen=True, eq=False):
    """The newest probes of one endpoint, and what they make of it. Strategies can only read it."""

    healthy: bool | None = None
    """``None`` before the first probe."""
    problem: str = "not probed yet"
    """What the last one found wrong, for people."""
    streak: int = 0
    """Successive probes that contradict ``healthy``."""

    def found(self, problem: str | None, threshold: int) -> bool:
        """Note a probe, ``None`` being success; return whether ``healthy`` has changed.

        The first one decides alone, later ones when ``threshold`` of them in a row contradict ``healthy``.
        """
        ok = problem is None
        _set(self, "problem", problem or "")
        if self.healthy is ok:
            _set(self, "streak", 0)
            return False
        _set(self, "streak", self.streak + 1)
        if self.healthy is not None and self.streak < threshold:
            return False
        _set(self, "healthy", ok)
        _set(self, "streak", 0)
        return True
