"""Requests whose instances died while they had them: a prompt can end an engine's process.

Such a request would end one instance after another, if it were handed on as often as others are.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

MAX_LOSSES = 2
"""Connections that a request may lose after it was delivered, on P and D together: one more attempt after
the first."""

PAUSE_S = 10.0
"""For how long a prompt that two instances have lost without an answer is refused.

A choice: short, since the prompt may be innocent, and both were killed by hand. One request after it shows
which; if that is lost too, the pause is twice as long.
"""

MAX_PAUSE_S = 900.0

MAX_PROMPTS = 1024
"""Prompts that are remembered, the ones lost last."""

DYING_S = 10.0
"""Between the 500 of an engine that dies and the moment when a probe finds it gone, at most."""


@dataclass(slots=True)
class _Losses:
    instances: set[str] = field(default_factory=set)
    count: int = 0
    refused_until: float = 0.0


class LostPrompts:
    """Remembers prompts whose requests lost their connections, until one of them is answered.

    An innocent request that was with an instance as it died is answered by the next one. Losses count by
    instance, so that one that breaks every connection does not make a prompt suspect.
    """

    def __init__(self) -> None:
        self._prompts: OrderedDict[int, _Losses] = OrderedDict()
        self._suspects: deque[tuple[float, str, int]] = deque(maxlen=MAX_PROMPTS)

    def __len__(self) -> int:
        return len(self._prompts) + len(self._suspects)

    def lost(self, prompt: int, instance: str, now: float) -> None:
        """Count a connection to an instance that was lost after the request had been delivered."""
        if not prompt:
            return
        losses = self._prompts.setdefault(prompt, _Losses())
        self._prompts.move_to_end(prompt)
        losses.instances.add(instance)
        # While it is refused, those are lost that were on their way: they say nothing new.
        if len(losses.instances) >= MAX_LOSSES and now >= losses.refused_until:
            pause = min(MAX_PAUSE_S, PAUSE_S * 2 ** min(losses.count, 10))
            losses.count += 1
            losses.refused_until = now + pause
        if len(self._prompts) > MAX_PROMPTS:
            self._prompts.popitem(last=False)

    def suspect(self, prompt: int, instance: str, now: float) -> None:
        """Remember a request that was answered 500: an engine that dies answers what it has so."""
        if prompt:
            self._suspects.append((now, instance, prompt))

    def died(self, instance: str, now: float) -> None:
        """Count what an instance has answered 500 in the seconds before it was found dead as lost."""
        for at, name, prompt in tuple(self._suspects):
            if name == instance or at < now - DYING_S:
                self._suspects.remove((at, name, prompt))
                if at >= now - DYING_S:
                    self.lost(prompt, name, now)

    @property
    def suspected(self) -> frozenset[str]:
        """Instances that have answered 500 of late."""
        return frozenset(name for _, name, _ in self._suspects)

    def answered(self, prompt: int) -> None:
        """Forget the losses of a prompt: it was not the reason."""
        self._prompts.pop(prompt, None)
        for suspect in [each for each in self._suspects if each[2] == prompt]:
            self._suspects.remove(suspect)

    def spent(self, prompt: int) -> int:
        """Return how many of its ``MAX_LOSSES`` a request of this prompt has no more.

        All but one if the prompt was refused before: a killer would take two instances more each time.
        """
        losses = self._prompts.get(prompt)
        return MAX_LOSSES - 1 if losses is not None and losses.count else 0

    def refused_for(self, prompt: int, now: float) -> float:
        """Return for how many seconds a prompt is refused; 0 if it is not."""
        losses = self._prompts.get(prompt)
        return 0.0 if losses is None else max(0.0, losses.refused_until - now)
