"""The metrics of several workers as those of one scheduler: a page of sums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import msgspec
from prometheus_client.utils import floatToGoString

SUMMED_GAUGES = frozenset(
    {
        "pd_scheduler_in_flight",
        "pd_scheduler_tokens_in_flight",
        "pd_scheduler_queue_requests",
        "pd_scheduler_queue_bytes",
        "pd_scheduler_held_bytes",
        "process_virtual_memory_bytes",
        "process_resident_memory_bytes",
        "process_open_fds",
    }
)
"""Gauges of a process's own work. All others are of the fleet, which all see: they are the first's."""

OWN, ELSEWHERE = "pd_scheduler_in_flight", "pd_scheduler_in_flight_elsewhere"
"""Requests on an instance: a worker's own, and all those of others that it knows."""

FIRSTS = frozenset({"pd_scheduler_instance_state_changes_total"})
"""Counters of what each worker sees, and all see alike."""

MAX_KEPT = 50_000
"""Series of workers that have ended, at most. With more they are forgotten: instances come and go."""

_STARTED = "process_start_time_seconds"
"""Tells a worker from the one before in its place."""


Values = dict[str, float]
"""By name and labels, as a line has them."""


@dataclass(slots=True)
class _Family:
    """A metric: its lines before the values, its type, and the values."""

    head: bytes = b""
    type: str = "untyped"
    values: Values = field(default_factory=dict)


class Counted(msgspec.Struct):
    """What outlives a worker: what those that have ended had counted, and of each the last that was told."""

    ended: dict[str, Values] = {}
    """By metric."""
    last: dict[str, tuple[float, dict[str, Values]]] = {}
    """By worker: when it was started, and its values by metric."""


class SummedMetrics:
    """Adds up the pages of workers.

    What a worker has counted goes on to count when it has ended, as far as it was told: a sum that falls
    would be taken for a restart of all, and all of it for new. ``counted`` is what to begin with.
    """

    def __init__(self, counted: Counted | None = None) -> None:
        self.counted = counted or Counted()

    def page(self, first: str, pages: Mapping[str, bytes]) -> Iterator[bytes]:
        """Yield a page of sums, metric by metric; ``pages`` are by worker, with that of the ``first``."""
        read = {worker: _read(page) for worker, page in pages.items()}
        for worker, families in read.items():
            self._count(worker, families)
        shown = read.pop(first)
        known = _both(shown)
        for families in read.values():
            for key, family in families.items():
                mine = shown.setdefault(key, _Family(family.head, family.type))
                if key in SUMMED_GAUGES:
                    _add(mine.values, family.values)
        if ELSEWHERE in shown:
            shown[ELSEWHERE].values = _elsewhere(known, shown[OWN].values)
        for key, family in shown.items():
            if _is_counted(key, family):
                family.values = {}
                for counts in (*(last for _, last in self.counted.last.values()), self.counted.ended):
                    _add(family.values, counts.get(key, {}))
            yield family.head + b"".join(
                f"{name} {_written(value)}\n".encode() for name, value in family.values.items()
            )

    def _count(self, worker: str, families: dict[str, _Family]) -> None:
        """Remember what a worker has counted; and what the one before in its place had, for good."""
        started = sum(families[_STARTED].values.values()) if _STARTED in families else 0.0
        before, counts = self.counted.last.get(worker), self.counted.ended
        if before is not None and before[0] != started:
            for key, values in before[1].items():
                _add(counts.setdefault(key, {}), values)
            if sum(map(len, counts.values())) > MAX_KEPT:
                counts.clear()
        counted = {key: family.values for key, family in families.items() if _is_counted(key, family)}
        self.counted.last[worker] = started, counted


def _is_counted(key: str, family: _Family) -> bool:
    return family.type in ("counter", "histogram") and key not in FIRSTS


def _written(value: float) -> str:
    text: str = floatToGoString(value)  # type: ignore[no-untyped-call]
    return text


def _both(families: Mapping[str, _Family]) -> Values:
    """Return the requests on each instance that a worker knows, its own and all others'."""
    if ELSEWHERE not in families:
        return {}
    found = dict(families[OWN].values)
    _add(found, {_renamed(name, ELSEWHERE, OWN): value for name, value in families[ELSEWHERE].values.items()})
    return found


def _elsewhere(known: Values, own: Values) -> Values:
    """Return the requests of those that are none of us: what the first knows, without all workers' own."""
    return {
        _renamed(name, OWN, ELSEWHERE): max(0.0, value - own.get(name, 0.0)) for name, value in known.items()
    }


def _renamed(name: str, before: str, after: str) -> str:
    return after + name[len(before) :]


def _add(to: Values, values: Values) -> None:
    for name, value in values.items():
        to[name] = to.get(name, 0.0) + value


def _read(page: bytes) -> dict[str, _Family]:
    """Return the metrics of a page that one of us has written."""
    families: dict[str, _Family] = {}
    family, helped = _Family(), b""
    for line in page.splitlines():
        if line.startswith(b"# HELP "):
            helped = line + b"\n"
        elif line.startswith(b"# TYPE "):
            key, _, kind = line[7:].decode().partition(" ")
            family = families[key] = _Family(helped + line + b"\n", kind)
        elif line:
            name, _, value = line.decode().rpartition(" ")
            family.values[name] = float(value)
    return families
