"""Requests whose D asks for the prefill: what is kept until then, who gets it, and when it is let go."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tests.support.asked import BASE, NONE, RAW, AskedCase
from tests.support.routing import BODY, P, answer, decode_body
from vllm_pd_scheduler.fleet.breaker import BreakerState
from vllm_pd_scheduler.handoff.interfaces import PrefillFailed
from vllm_pd_scheduler.models import ConnectorChoice
from vllm_pd_scheduler.request.gateway_names import MAX_RETRIES
from vllm_pd_scheduler.routing.attempts import FailedAttempt, Failure
from vllm_pd_scheduler.routing.decode_first import Called


class AskedTest(AskedCase):
    async def test_p_gets_nothing_before_d_has_called(self) -> None:
        forward = await self.begun(x_request_id="mine")
        params = decode_body(forward)["kv_transfer_params"]
        self.assertTrue(params["metaserver"].startswith(f"{BASE}/v1/metaserver/"))
        self.assertGreater(len(params["metaserver"].rpartition("/")[2]), 20)
        headers = forward.headers()
        self.assertEqual(headers["x-pd-prefill"], "(later)")
        self.assertEqual(headers["x-pd-request-id"], "mine")
        self.assertEqual(self.leg.sent, [])
        self.assertEqual(self.router.registry.get("p0").in_flight, 1, "a place is kept")
        self.assertEqual(self.call(forward), Called.ACCEPTED)
        await self.settled()
        ((name, path, sent_headers, sent),) = self.leg.sent
        self.assertEqual((name, path), ("p0", "/v1/completions"))
        self.assertEqual(sent_headers["x-request-id"], headers["x-request-id"])
        self.assertEqual(
            sent, {**BODY, "max_tokens": 1, "min_tokens": 1, "stream": False, "kv_transfer_params": self.said}
        )
        self.assertEqual(self.router.registry.get("p0").in_flight, 0)
        self.assertEqual(forward.prefill.id, "p0")
        forward.release()
        self.assertIdle()
        self.assertEqual((len(self.first), self.memory.used), (0, 0))

    async def test_the_body_counts_until_p_has_answered(self) -> None:
        self.leg.hold = asyncio.Event()
        forward = await self.begun()
        self.assertEqual(self.memory.used, RAW)
        self.call(forward)
        await self.leg.entered.wait()
        self.assertEqual(self.memory.used, RAW)
        self.leg.hold.set()
        await self.settled()
        self.assertEqual((self.memory.used, len(self.first)), (0, 1))
        forward.release()
        self.assertEqual(len(self.first), 0)

    async def test_a_client_that_leaves_before_the_call(self) -> None:
        """D may have allocated by then, and keeps its blocks until P has written them."""
        forward = await self.begun()
        splice = forward.splice
        forward.release()
        self.assertIdle()
        self.assertEqual(self.memory.used, RAW)
        forward.splice = splice
        self.assertEqual(self.call(forward), Called.ACCEPTED)
        await self.settled()
        self.assertEqual(self.leg.tried, ["p0"])
        self.assertEqual((len(self.first), self.memory.used), (0, 0))

    async def test_a_call_that_comes_too_late(self) -> None:
        forward = await self.begun()
        splice = forward.splice
        forward.release()
        self.pass_grace()
        self.assertEqual((len(self.first), self.memory.used), (0, 0))
        forward.splice = splice
        self.assertEqual(self.call(forward), Called.UNKNOWN)
        self.assertEqual(self.leg.sent, [])
        self.assertEqual(self.count("pd_scheduler_metaserver_calls_total", outcome="unknown"), 1)

    async def test_a_client_that_leaves_after_the_call(self) -> None:
        self.leg.hold = asyncio.Event()
        forward = await self.begun()
        self.call(forward)
        await self.leg.entered.wait()
        forward.release()
        self.pass_grace()
        await self.settled()
        self.assertEqual(len(self.first), 1, "P goes on")
        self.leg.hold.set()
        await self.settled()
        self.assertEqual((len(self.first), self.memory.used), (0, 0))
        self.assertIdle()

    async def test_a_drain_waits_for_what_d_has_asked_for(self) -> None:
        self.leg.hold = asyncio.Event()
        forward = await self.begun()
        self.call(forward)
        await self.leg.entered.wait()
        forward.release()
        waits = asyncio.ensure_future(self.first.idle())
        await self.settled()
        self.assertFalse(waits.done())
        self.leg.hold.set()
        await waits
        self.assertEqual(len(self.first), 0)

    async def test_calls_that_nobody_gets_anything_for(self) -> None:
        forward = await self.begun()
        self.assertEqual(self.call(forward, host="10.0.0.3"), Called.ELSEWHERE)
        self.assertEqual(self.first.called("guessed", "10.0.0.2", b"{}"), Called.UNKNOWN)
        self.assertEqual(self.leg.sent, [])
        self.assertEqual(self.call(forward), Called.ACCEPTED, "its own D is not kept from it")
        self.assertEqual(self.call(forward), Called.REPEATED)
        await self.settled()
        self.assertEqual(self.call(forward), Called.REPEATED)
        await self.settled()
        self.assertEqual(len(self.leg.sent), 1)

    async def test_nonsense_ends_the_request(self) -> None:
        forward = await self.begun()
        self.assertEqual(self.call(forward, request_id="cmpl-other-0"), Called.UNREADABLE)
        self.assertEqual([(each.status, each.reason) for each in self.refused], [(502, "metaserver_call")])
        self.assertEqual(self.leg.sent, [])

    async def test_another_p_is_tried_for_the_same_d(self) -> None:
        for failed in (
            answer(500),
            answer(429),
            answer(401),
            PrefillFailed("connect"),
            PrefillFailed("reset", lost=True),
        ):
            self.leg.sent.clear()
            self.leg.answers["p0"] = failed
            self.leg.answers["p1"] = self.leg.answers["p2"] = NONE
            forward = await self.begun()
            while forward.prefill.id != "p0":
                forward.release()
                forward = await self.begun()
            self.call(forward)
            await self.settled()
            self.assertEqual(self.leg.tried[0], "p0", failed)
            self.assertEqual(len(self.leg.tried), 2, failed)
            ids = {headers["x-request-id"] for _, _, headers, _ in self.leg.sent}
            self.assertEqual(ids, {forward.headers()["x-request-id"]})
            self.assertEqual(forward.prefill.id, self.leg.tried[1])
            self.assertEqual(self.refused, [])
            forward.release()

    async def test_no_p_can_do_it(self) -> None:
        """D waits: the client is told at once. It is no fault of D's."""
        self.fail_all(answer(500))
        forward = await self.begun()
        decode = forward.decode[0]
        self.call(forward)
        await self.settled()
        self.assertEqual(len(self.leg.tried), 3)
        self.assertEqual([each.status for each in self.refused], [503])
        failed = FailedAttempt(str(decode.address), Failure.LEFT, forward.id)
        before = decode.breaker
        self.router.in_flight.attempt_failed(failed)
        self.assertIs(decode.breaker, before)
        forward.release()
        self.router.in_flight.ended.settle(0.0)
        self.assertIdle()
        self.assertEqual((len(self.first), self.memory.used), (0, 0))

    async def test_what_p_refuses_is_told(self) -> None:
        """D would have refused it too, had it not been taken."""
        self.fail_all(answer(400, b'{"error":{"message":"too long"}}'))
        forward = await self.begun()
        self.call(forward)
        await self.settled()
        self.assertEqual([each.status for each in self.refused], [400])
        self.assertEqual(len(self.leg.tried), 2, "two say so")

    async def test_no_other_p_after_one_that_may_still_be_at_it(self) -> None:
        """It could write when another one has done it, and D's blocks are another prompt's."""
        for reason in ("timeout", "hung"):
            self.leg.sent.clear()
            self.fail_all(PrefillFailed(reason, lost=reason == "hung"))
            forward = await self.begun()
            self.call(forward)
            await self.settled()
            self.assertEqual(len(self.leg.tried), 1)
            self.assertEqual([each.status for each in self.refused], [503])
            forward.release()

    async def test_one_more_try_ends_with_the_request(self) -> None:
        """The P before may have done it: then D goes on, and gives its blocks to another prompt."""
        self.leg.answers["p0"] = PrefillFailed("reset", lost=True)
        forward = await self.begun()
        hold, leg = asyncio.Event(), self.leg

        async def slow(endpoint: Any, *args: Any) -> Any:
            found = await leg(endpoint, *args)
            await hold.wait()
            return found

        self.router.prefill_leg = slow
        self.call(forward)
        await self.settled()
        self.assertEqual((self.leg.tried[0], len(self.leg.tried)), ("p0", 2))
        forward.release()
        await self.settled()
        self.assertEqual((len(self.first), self.memory.used), (0, 0))
        self.assertIdle()

    async def test_d_fails_and_another_one_computes_the_prompt(self) -> None:
        forward = await self.begun()
        first = forward.decode[0]
        self.router.in_flight.attempt_failed(FailedAttempt(str(first.address), Failure.RESET, forward.id))
        self.assertIdleOfPrefills()
        self.pass_grace()
        self.assertEqual((len(self.first), self.memory.used), (0, 0))
        self.assertIsNot(forward.answering, first)
        forward.release()

    def assertIdleOfPrefills(self) -> None:
        self.assertEqual({self.router.registry.get(name).in_flight for name in ("p0", "p1", "p2")}, {0})

    async def test_p_is_chosen_anew_if_it_has_gone(self) -> None:
        forward = await self.begun()
        self.down("p0")
        self.call(forward)
        await self.settled()
        (name,) = self.leg.tried
        self.assertNotEqual(name, "p0")
        self.assertEqual(forward.prefill.id, name)
        first, second = forward.decision.prefill_attempts
        self.assertEqual((first.instance, first.outcome), ("p0", "reserved"))
        self.assertEqual((second.instance, second.outcome), (name, "ok"))

    async def test_each_p_has_its_turn(self) -> None:
        for _ in range(6):
            forward = await self.begun()
            self.call(forward)
            await self.settled()
            forward.release()
        self.assertEqual(self.leg.tried, ["p0", "p1", "p2"] * 2)

    async def test_a_gateway_sends_it_once(self) -> None:
        forward = await self.begun()
        self.assertEqual(forward.gateway_headers()[MAX_RETRIES], "0")
        forward.for_gateway(fallbacks=True)
        self.assertEqual(len(forward.decode), 1)

    async def test_while_nobody_listens_d_computes_the_prompt(self) -> None:
        self.first.listen(None)
        self.assertLocal(await self.route())
        self.assertEqual(self.count("pd_scheduler_local_errors_total", kind="metaserver"), 1)
        self.assertIdleOfPrefills()

    async def test_a_place_in_the_body_is_needed(self) -> None:
        size = self.router.config.max_body_bytes
        forward = await self.route({**BODY, "prompt": "x" * (size - RAW - 100)})
        self.assertLocal(forward)
        self.assertIdleOfPrefills()


class AnyCallerTest(AskedCase):
    CONFIG: Mapping[str, Any] = {"connector": "ascend-layerwise", "metaserver_callers": "any"}

    async def test_whoever_has_the_url_may_call(self) -> None:
        forward = await self.begun()
        self.assertEqual(self.call(forward, host="10.0.0.3"), Called.ACCEPTED)
        await self.settled()


class AskedInVainTest(AskedCase):
    async def test_a_prompt_that_others_have_lost_meanwhile(self) -> None:
        forward = await self.begun()
        lost, now = self.router.in_flight.lost, self.router.clock()
        for instance in ("p1", "p2"):
            lost.lost(forward.prompt, instance, now)
        self.assertTrue(lost.refused_for(forward.prompt, now))
        self.assertEqual(self.call(forward), Called.ACCEPTED)
        await self.settled()
        self.assertEqual([each.reason for each in self.refused], ["lost"])
        self.assertEqual(self.leg.sent, [])
        forward.release()
        self.assertIdle()
        self.assertEqual((len(self.first), self.memory.used), (0, 0))

    async def test_nonsense_counts_once_however_often_d_tries(self) -> None:
        forward = await self.begun()
        for _ in range(30):
            self.assertEqual(self.call(forward, request_id="cmpl-other-0"), Called.UNREADABLE)
        self.assertIs(forward.decode[0].breaker.state, BreakerState.CLOSED)

    async def test_no_p_is_left_when_d_asks(self) -> None:
        """One that was taken out meanwhile gets nothing."""
        forward = await self.begun()
        for name in ("p0", "p1", "p2"):
            self.router.unregister_instance(name)
        self.assertEqual(self.call(forward), Called.ACCEPTED)
        await self.settled()
        self.assertEqual(self.leg.sent, [])
        self.assertEqual([each.reason for each in self.refused], ["no_prefill"])
        forward.release()
        self.assertEqual((len(self.first), self.memory.used), (0, 0))

    async def test_only_p_of_another_connector_are_left_when_d_asks(self) -> None:
        """What D has said is nothing for their engines."""
        forward = await self.begun()
        nixl = ConnectorChoice("nixl")
        for endpoint in self.router.registry.endpoints(P):
            self.router.registry.describe(endpoint.id, replace(endpoint.instance, connector=nixl))
        self.assertEqual(self.call(forward), Called.ACCEPTED)
        await self.settled()
        self.assertEqual(self.leg.sent, [])
        self.assertEqual([each.reason for each in self.refused], ["no_prefill"])
        forward.release()
        self.assertIdle()
        self.assertEqual((len(self.first), self.memory.used), (0, 0))
