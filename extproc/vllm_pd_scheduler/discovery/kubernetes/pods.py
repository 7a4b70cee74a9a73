"""What becomes of pods: each port of a usable one, in each of its roles, may be an instance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...models import MAX_RANKS, InstanceRole
from .candidates import Candidate, LeftOut
from .objects import Pod
from .watch import Resource

PODS = Resource("v1", "pods", Pod)

ACTIVE_PORTS = ("llm-d.ai/active-ports", "inference.networking.k8s.io/active-ports")
"""Annotations that say at which of the ports a pod serves; the first that it has counts."""


@dataclass(frozen=True, slots=True)
class PodLabels:
    """Which labels say what of a pod."""

    role: str
    roles: Mapping[InstanceRole, frozenset[str]]
    """Values of the role's label; the empty one stands for a pod without it."""
    model: str | None = None
    revision: str | None = None
    data_parallel_size: str | None = None


class PodReader:
    """Reads the pods of a namespace. One that is as it was is not read again."""

    def __init__(self, labels: PodLabels) -> None:
        self._labels = labels
        self._ports: tuple[int, ...] = ()
        self._read: dict[str, tuple[Pod, Sequence[Candidate] | LeftOut]] = {}

    def read(
        self, pods: Mapping[str, Pod], ports: Iterable[int]
    ) -> tuple[list[Candidate], Mapping[str, list[str]]]:
        """Return what may be instances, and which pods are left out for what reasons."""
        known = self._read if self._ports == tuple(ports) else {}
        self._ports = tuple(ports)
        candidates: list[Candidate] = []
        left_out: dict[str, list[str]] = defaultdict(list)
        self._read = {}
        for name, pod in pods.items():
            before = known.get(name)
            now = before if before is not None and before[0] is pod else (pod, self._candidates(pod))
            self._read[name] = now
            if isinstance(now[1], LeftOut):
                left_out[str(now[1])].append(name)
            else:
                candidates += now[1]
        return candidates, left_out

    def _candidates(self, pod: Pod) -> Sequence[Candidate] | LeftOut:
        try:
            return tuple(candidates_of(pod, self._ports, self._labels))
        except LeftOut as reason:
            return reason


def candidates_of(pod: Pod, ports: Sequence[int], labels: PodLabels) -> Iterator[Candidate]:
    """Yield what a pod may be, nothing if no request may go there now; raises :exc:`LeftOut`."""
    if not pod.usable or pod.ip is None:
        return
    metadata = pod.metadata
    active, size = _active_ports(pod), _rank_count(pod, labels)
    for role in _roles(pod, labels):
        for index, port in enumerate(ports):
            if active is None or port in active:
                yield Candidate(
                    role=role,
                    name=f"{metadata.name}-rank-{index}" if len(ports) > 1 else metadata.name,
                    host=pod.ip,
                    port=port,
                    since=metadata.creation_timestamp or "",
                    model=metadata.label(labels.model) if labels.model else None,
                    revision=metadata.label(labels.revision) if labels.revision else None,
                    data_parallel_size=size,
                )


def _roles(pod: Pod, labels: PodLabels) -> list[InstanceRole]:
    value = pod.metadata.label(labels.role) or ""
    found = [role for role in InstanceRole if value in labels.roles.get(role, ())]
    if not found:
        what = f"{labels.role} is {value!r}" if value else f"it has no label {labels.role}"
        raise LeftOut(f"{what}, which makes it neither prefill, decode nor encode")
    return found


def _rank_count(pod: Pod, labels: PodLabels) -> int:
    key = labels.data_parallel_size
    said = (key and pod.metadata.label(key)) or "1"
    if not (said.isascii() and said.isdigit() and len(said) <= 5 and 1 <= int(said) <= MAX_RANKS):
        raise LeftOut(f"its label {key} must be a number up to {MAX_RANKS}, not {said!r}")
    return int(said)


def _active_ports(pod: Pod) -> frozenset[int] | None:
    """Return the ports at which a pod says it serves, ``None`` if it says nothing of them."""
    for key in ACTIVE_PORTS:
        if (text := pod.metadata.annotation(key)) is not None:
            try:
                return frozenset(int(part) for part in text.split(",") if part.strip())
            except ValueError:
                raise LeftOut(f"its annotation {key} is no list of ports: {text[:100]!r}") from None
    return None
