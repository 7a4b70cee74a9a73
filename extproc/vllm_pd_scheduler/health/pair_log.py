"""Say when hand-offs of a P and a D are left out or slow, and when they are well again."""

from __future__ import annotations

import logging

from ..fleet.pairs import PairChange
from ..fleet.registry import Registry
from ..models import By
from ..prediction.transfer_rates import PairRate
from ..records.events import EventKind, Events


class PairLog:
    """Makes an event of each change in what is known of the pairs of P and D."""

    def __init__(self, registry: Registry, events: Events) -> None:
        self._events = events
        registry.pairs.on_change = self._left_out
        registry.load.transfers.on_slow = self._slow

    def _left_out(self, change: PairChange) -> None:
        decode = "any decode instance" if change.decode is None else change.decode.instance.instance_id
        prefill = change.prefill.instance.instance_id
        pair = f"{prefill} to {decode}"
        if change.out:
            text = f"hand-offs from {pair} fail: the next is tried in {change.pause:g} s"
        else:
            text = f"hand-offs from {pair} work again"
        self._add(text, prefill, change.out)

    def _slow(self, pair: PairRate) -> None:
        names = f"{pair.prefill} to {pair.decode}"
        if pair.slow:
            text = (
                f"hand-offs from {names} take {pair.times:.1f} times as long as those of the median pair: "
                "have they fallen back to TCP? Look at UCX_TLS, UCX_NET_DEVICES and the network cards of both"
            )
        else:
            text = f"hand-offs from {names} are no longer slow"
        self._add(text, pair.prefill, pair.slow)

    def _add(self, text: str, subject: str, bad: bool) -> None:
        level = logging.WARNING if bad else logging.INFO
        self._events.add(EventKind.PAIR, text, by=By.REQUEST, subject=subject, level=level)
