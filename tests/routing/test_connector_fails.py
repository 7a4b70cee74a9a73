"""A connector that fails: decode serves the request whole, and nothing stays reserved, pinned or blamed."""

import logging
from collections.abc import Mapping
from typing import Any

from tests.support.routing import BODY, PARAMS, Case, answer, decode_body
from vllm_pd_scheduler.connectors import NixlConnector
from vllm_pd_scheduler.fleet.breaker import BreakerState
from vllm_pd_scheduler.handoff.pending import PendingHandoff
from vllm_pd_scheduler.handoff.release import HandoffReleaser

ON_THE_WAY = ("can_split", "order", "question", "prefill_body", "handoff", "ended", "splice")
"""The calls that are made before a request goes to decode."""


class Odd(NixlConnector):
    """Raises in the calls that ``odd`` names."""

    def __init__(self) -> None:
        self.odd: set[str] = set()

    def __getattribute__(self, name: str) -> Any:
        if name in object.__getattribute__(self, "odd") if name != "odd" else ():
            raise ZeroDivisionError(name)
        return object.__getattribute__(self, name)


class ConnectorFailsTest(Case):
    CONFIG: Mapping[str, Any] = {"max_retries": 2}
    CONNECTOR = Odd

    def setUp(self) -> None:
        super().setUp()
        self.odd: set[str] = self.router.connectors.of(None)._connector.odd
        self.freed: list[PendingHandoff] = []
        self.router.in_flight.handoffs.release = self.freed.append
        logging.disable(logging.ERROR)
        self.addCleanup(logging.disable, logging.NOTSET)

    def failures(self, call: str) -> int:
        return self.router.connectors.failures.counts["Odd", call]

    def stranded(self) -> float:
        return self.count("pd_scheduler_handoffs_unused_total", prefill="p0", outcome="stranded")

    async def serve(self, call: str) -> None:
        """Send requests, more than would eject an instance that failed them."""
        self.odd.add(call)
        if call == "ended":
            self.leg.answers = dict.fromkeys(("p0", "p1", "p2"), answer(params=None))
        for number in range(1, 13):
            tried = len(self.leg.tried)
            forward = await self.route()
            self.assertLocal(forward)
            self.assertEqual(self.failures(call), number)
            why = call if call == "splice" else "connector" if call == "can_split" else "prefill"
            self.assertEqual(self.router.decisions.after(0)[-1].not_split, why)
            self.assertLessEqual(len(self.leg.tried), tried + 1, "no other P is troubled")
            forward.release()
            self.assertIdle()

    async def test_decode_serves_the_request_and_no_instance_is_blamed(self) -> None:
        for setting in ("local", "fail"):
            for call in ON_THE_WAY:
                with self.subTest(call, on_prefill_failure=setting):
                    self.CONFIG = {"max_retries": 2, "on_prefill_failure": setting}
                    self.setUp()
                    await self.serve(call)
                    for endpoint in self.router.registry:
                        self.assertIs(endpoint.breaker.state, BreakerState.CLOSED)

    async def test_what_p_has_made_is_freed_or_counted(self) -> None:
        await self.serve("splice")
        self.assertEqual(len(self.freed), 12)
        self.assertEqual(sum(e.pending_handoffs for e in self.router.registry), 0)
        self.setUp()
        await self.serve("handoff")
        self.assertEqual(self.stranded(), 4.0, "a hand-off that nobody can read is left to its lease")

    async def test_it_may_work_again(self) -> None:
        for call in ON_THE_WAY:
            with self.subTest(call):
                self.setUp()
                self.odd.add(call)
                (await self.route()).release()
                self.odd.clear()
                forward = await self.route()
                self.assertEqual(decode_body(forward), {**BODY, "kv_transfer_params": PARAMS})
                forward.release()
                self.assertIdle()

    async def test_a_hand_off_without_a_body_to_free_it(self) -> None:
        await self.serve("splice")
        self.odd.add("release_body")
        releaser = self.releaser()
        releaser(self.freed[0])
        await releaser.close()
        self.assertEqual(self.stranded(), 1.0)
        self.assertEqual(self.failures("release_body"), 1)

    async def test_an_answer_for_a_client_that_has_left(self) -> None:
        self.odd.add("handoff")
        releaser = self.releaser()
        endpoint = self.router.registry.get("p0")
        attempt = self.router.connectors.attempt(endpoint)
        releaser.unwanted(endpoint, answer(), attempt)
        await releaser.close()
        self.assertEqual(self.stranded(), 1.0)
        self.assertEqual(self.failures("handoff"), 1)

    def releaser(self) -> HandoffReleaser:
        """One that sends nothing."""
        router, session = self.router, None
        return HandoffReleaser(session, router.registry, router.telemetry, router.scheduler.fitting)  # type: ignore[arg-type]
