"""Requests whose D asks for the prefill, with a connector of an operator's own that fails in each call."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tests.support.asked import AskedCase
from vllm_pd_scheduler.connectors import Handoff, Legs, Peer, Question, Settings
from vllm_pd_scheduler.connectors.ascend_layerwise import AscendLayerwiseConnector
from vllm_pd_scheduler.fleet.breaker import BreakerState
from vllm_pd_scheduler.handoff.interfaces import PrefillNotSent
from vllm_pd_scheduler.routing.decode_first import Called


class Asking(AscendLayerwiseConnector):
    """One of an operator's own, whose D asks, and which does what ``odd`` says in a call."""

    can_pull = True

    def __init__(self) -> None:
        self.odd: dict[str, Callable[..., Any]] = {}

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        return found if name == "odd" else self.odd.get(name, found)


def _fails(*_: Any) -> Any:
    raise ZeroDivisionError


class OwnConnectorTest(AskedCase):
    CONFIG: Mapping[str, Any] = {"max_retries": 2}
    CONNECTOR = Asking  # type: ignore[assignment]

    def setUp(self) -> None:
        super().setUp()
        self.odd: dict[str, Any] = self.router.connectors.of(None)._connector.odd
        logging.disable(logging.ERROR)
        self.addCleanup(logging.disable, logging.NOTSET)

    def assertNothingLeft(self) -> None:
        self.assertIdle()
        self.assertEqual((len(self.first), self.memory.used), (0, 0))
        self.assertEqual([e.id for e in self.router.registry if e.pending_handoffs], [])
        for endpoint in self.router.registry:
            self.assertIs(endpoint.breaker.state, BreakerState.CLOSED, endpoint.id)

    async def test_d_alone_serves_what_cannot_be_prepared(self) -> None:
        """Its order was told, and no place at P is kept for it."""

        async def unanswered(*_: Any) -> Any:
            raise PrefillNotSent("question")

        unanswered.forget = lambda _: None  # type: ignore[attr-defined]
        for call in ("question", "invitation", "splice"):
            with self.subTest(call):
                self.setUp()
                self.odd[call] = _fails
                forward = await self.route()
                self.assertLocal(forward)
                forward.release()
                self.pass_grace()
                self.assertNothingLeft()
        self.setUp()
        self.router.ask_prefill = unanswered  # type: ignore[assignment]
        self.odd["question"] = lambda _: Question(80, "/")
        (await self.route()).release()
        self.assertNothingLeft()
        self.setUp()
        self.odd |= {"names_rank": lambda _: True, "can_split": lambda _: True}
        (await self.route({"model": "m", "input": "x"}, "/v1/responses")).release()
        self.assertNothingLeft()

    async def test_an_invitation_pins_nothing_at_p(self) -> None:
        """P has nothing yet, whatever is said of it: nothing is freed, and nothing counted twice."""
        made = AscendLayerwiseConnector.invitation
        self.odd["invitation"] = lambda *args: replace(made(AscendLayerwiseConnector(), *args), pinned=True)
        for asks in (True, False):
            forward = await self.begun()
            if asks:
                self.assertEqual(self.call(forward), Called.ACCEPTED)
                await self.settled()
            forward.release()
            self.pass_grace()
            self.assertNothingLeft()

    async def test_an_invitation_that_does_not_fit_into_the_body(self) -> None:
        size = self.router.config.max_body_bytes
        self.odd["invitation"] = lambda legs, url: Handoff(b'{"x":"%s"}' % (b"x" * size), pinned=False)
        forward = await self.route()
        self.assertLocal(forward)
        forward.release()
        self.pass_grace()
        self.assertNothingLeft()

    async def test_a_call_that_cannot_be_read_for_the_connectors_fault(self) -> None:
        for _ in range(12):
            forward = await self.begun()
            self.odd["asked"] = _fails
            self.assertEqual(self.call(forward), Called.UNREADABLE)
            self.assertEqual([each.status for each in self.refused], [503])
            self.odd.clear()
            forward.release()
            self.pass_grace()
        self.assertNothingLeft()

    async def test_p_pulls_from_what_is_a_source_for_it(self) -> None:
        """Not from that of the P which was chosen first: that may be this one."""
        forward = await self.begun()
        (kept,) = self.first._expected.values()
        peers = [Peer(name, "10.0.0.1", 8000, Settings()) for name in ("p1", "p2")]
        kept.later = replace(kept.later, attempt=kept.later.attempt.pulling_from(peers[0]))
        seen: list[Peer | None] = []

        def body(_: Any, legs: Legs) -> bytes:
            seen.append(legs.source)
            return b"{}"

        self.odd["prefill_body"] = body
        self.assertEqual(self.call(forward), Called.ACCEPTED)
        await self.settled()
        self.assertEqual(seen, [None])
        self.assertIs(kept.later.attempt.by(peers[0], peers[1]).legs.source, peers[1])
        forward.release()
        self.assertNothingLeft()

    async def test_a_call_for_which_nothing_can_be_made(self) -> None:
        for call, odd in (
            ("prefill_body", _fails),
            ("prefill_body", lambda *_: None),
            ("prefill_headers", _fails),
            ("handoff", _fails),
            ("handoff", lambda *_: None),
        ):
            with self.subTest(call):
                self.setUp()
                forward = await self.begun()
                self.odd[call] = odd
                self.assertEqual(self.call(forward), Called.ACCEPTED)
                await self.settled()
                self.assertEqual([each.status for each in self.refused], [503])
                forward.release()
                self.assertIdle()
                self.assertEqual((len(self.first), self.memory.used), (0, 0))
