"""The pairs of P and D that have given wrong texts: no hand-off goes from the one to the other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from .endpoint import Endpoint


class WrongPairs:
    """Pairs that are left out until somebody takes them back, or one of them is another process or gone."""

    def __init__(self) -> None:
        self.on_verdict: Callable[[Endpoint, Endpoint, bool], None] | None = None
        """Called with P, D and whether they are left out, when a check of ours has found that."""
        self.why: dict[Endpoint, dict[Endpoint, str]] = {}
        """By P and D."""

    def __bool__(self) -> bool:
        return bool(self.why)

    def __iter__(self) -> Iterator[tuple[Endpoint, Endpoint, str]]:
        """Yield P, D and why."""
        return ((p, d, why) for p, found in self.why.items() for d, why in found.items())

    def leave_out(self, prefill: Endpoint, decode: Endpoint, why: str) -> None:
        """Send no hand-off of a P to a D from now on."""
        self.leave_out_elsewhere(prefill, decode, why)
        if self.on_verdict is not None:
            self.on_verdict(prefill, decode, True)

    def leave_out_elsewhere(self, prefill: Endpoint, decode: Endpoint, why: str) -> None:
        """Do so because another replica has found it."""
        self.why.setdefault(prefill, {})[decode] = why

    def take_back(self, prefill: Endpoint, decode: Endpoint) -> bool:
        """Use a pair again; return whether it was left out."""
        was = self.take_back_elsewhere(prefill, decode)
        if was and self.on_verdict is not None:
            self.on_verdict(prefill, decode, False)
        return was

    def take_back_elsewhere(self, prefill: Endpoint, decode: Endpoint) -> bool:
        """Do so because another replica has found that it works."""
        found = self.why.get(prefill, {})
        was = found.pop(decode, None) is not None
        if not found:
            self.why.pop(prefill, None)
        return was

    def forget(self, endpoint: Endpoint) -> None:
        """Take back all pairs of an instance, since that is gone or another process."""
        self.why.pop(endpoint, None)
        for prefill in tuple(self.why):
            self.take_back_elsewhere(prefill, endpoint)

    def barred(self, prefill: Endpoint) -> Collection[Endpoint]:
        """Return the D that may not get what a P hands over."""
        return self.why.get(prefill, {}).keys()

    @property
    def prefill(self) -> Collection[Endpoint]:
        """The P of which some pair is left out."""
        return self.why.keys()
