"""What a fleet in virtual time is like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..models import InstanceRole
from ..sim.profile import EngineProfile
from ..sim.setups import setup
from . import DEFAULT_SETUP, OVERSUBSCRIPTION


@dataclass(frozen=True)
class FleetSpec:
    """A fleet: how many instances of which set-up. ``seed`` makes all that is random repeatable.

    The constructor raises :exc:`ValueError` for an unknown set-up.
    """

    prefill: int
    decode: int
    setup: str = DEFAULT_SETUP
    seed: int = 0
    realistic: bool = False
    """Whether answers are cached where they were written, transfers share links, a turn waits for the answer
    before it, sessions are the trace's, and other routers learn of caches as late as they really do."""
    leaves: int = 1
    """Leaf switches that the instances are spread over; with one, transfers only share ports."""
    oversubscription: float = OVERSUBSCRIPTION
    """How many times as much the ports of a leaf switch can carry as its cables to the others."""
    foreign: float = 0.0
    """Share of the sessions that another router sends, of which the one that is measured knows nothing."""
    engines: Mapping[InstanceRole, EngineProfile] | None = None
    """In place of those of the set-up."""

    def __post_init__(self) -> None:
        self.profile(16, InstanceRole.PREFILL)

    def profile(self, block_size: int, role: InstanceRole) -> EngineProfile:
        """Return the profile of each engine of a role, with blocks of ``block_size`` tokens."""
        if self.engines is None:
            return setup(self.setup, block_size=block_size)
        engine = self.engines[role]
        return replace(engine, block_size=block_size, num_blocks=max(1, engine.capacity // block_size))


def pooled(profile: EngineProfile, count: int) -> EngineProfile:
    """Return the profile of one engine as fast and as large as ``count``, for the lower bound.

    Its steps have no fixed cost. A fleet with a queue shares that among the many tokens of long steps; one
    fast engine that never has a queue would pay it for each prompt, and be slower than a bound may be.
    """
    return replace(
        profile,
        num_blocks=profile.num_blocks * count,
        max_num_seqs=profile.max_num_seqs * count,
        step_overhead=0.0,
        prefill_min=0.0,
        prefill_rate=profile.prefill_rate * count,
        prefill_per_kv_token=profile.prefill_per_kv_token / count,
        decode_base=profile.decode_base / count,
        decode_per_seq=profile.decode_per_seq / count,
        decode_per_kv_token=profile.decode_per_kv_token / count,
        transfer_bandwidth=profile.transfer_bandwidth * count,
    )
