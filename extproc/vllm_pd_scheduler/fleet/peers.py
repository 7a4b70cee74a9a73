"""Whether an instance answers otherwise than its peers do.

Some ends of a request say nothing by themselves: a client that leaves may be impatient or have found a mute
instance, a 404 may be the client's mistake or that of an instance with another model, a time-out may be an
instance that hangs or a fleet that is busy. They do when the others of the role have no such ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

WEIGHT = 0.25
"""Weight of the newest request in an instance's share of doubtful ends."""

ODD = 0.75
"""Share from which an instance is odd if its peers are not: five doubtful ends in a row reach it."""

NORMAL = 0.25
"""Mean share up to which the peers are not: were it more, clients or the load could be the reason."""


@dataclass(slots=True)
class DoubtfulEnds:
    """The share of an instance's recent requests that ended doubtfully (0 to 1), newer ones counting more."""

    _share: float = 0.0

    def doubtful(self) -> None:
        """Count a request that ended so."""
        self._share += WEIGHT * (1.0 - self._share)

    def clear(self) -> None:
        """Count a request that the instance served."""
        self._share *= 1.0 - WEIGHT

    def reset(self) -> None:
        """Forget all of them."""
        self._share = 0.0

    def odd_among(self, peers: Iterable[DoubtfulEnds]) -> bool:
        """Whether this instance has so many where its peers have few; without peers nobody can tell.

        The peers are looked at only if it has so many.
        """
        if self._share < ODD:
            return False
        shares = [peer._share for peer in peers]
        return bool(shares) and sum(shares) / len(shares) <= NORMAL
