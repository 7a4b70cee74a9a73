"""What becomes of a configuration that is read again while the scheduler runs."""

from __future__ import annotations

from dataclasses import dataclass

from .schema import SchedulerConfig


@dataclass(frozen=True, slots=True)
class Reloaded:
    """The keys that differ between two configurations."""

    changed: list[str]
    """Those that count from now on."""
    needs_restart: list[str]
    """Those that stay as they were until the next start."""


def compare(before: SchedulerConfig, after: SchedulerConfig) -> Reloaded:
    """Return what another configuration changes: which keys are live is said in the schema."""
    changed: list[str] = []
    needs_restart: list[str] = []
    for key in before.differs(after):
        (needs_restart if SchedulerConfig.needs_restart(key) else changed).append(key)
    return Reloaded(changed, needs_restart)
