"""P and D have a request at the same time: one prefill for each attempt at D, and none that outlives it."""

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

from tests.support.routing import BODY, Ask, Case, D, Leg, P, answer, decode_body
from tests.support.waiting import until
from vllm_pd_scheduler.connectors import Attempt
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.handoff.interfaces import PrefillAnswer, PrefillFailed
from vllm_pd_scheduler.models import ConnectorChoice, InstanceRole, PDInstance
from vllm_pd_scheduler.routing import together
from vllm_pd_scheduler.routing.attempts import FailedAttempt, Failure, Retry
from vllm_pd_scheduler.routing.forward import Forward

RAW = json.dumps(BODY).encode()
COUNTED = answer(body=b'{"usage":{"prompt_tokens":7,"prompt_tokens_details":{"cached_tokens":3}}}')


class Prefills(Leg):
    """A leg that is told when P accepts a request, and what it answers then."""

    def __init__(self) -> None:
        super().__init__()
        self.refuses: dict[str, Exception] = {}
        """Who fails before it has the request."""
        self.futures: list[tuple[str, asyncio.Future[PrefillAnswer]]] = []

    async def __call__(
        self,
        endpoint: Endpoint,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        attempt: Attempt,
        sent: Callable[[], object] | None = None,
    ) -> PrefillAnswer:
        self.sent.append((endpoint.id, path, {**headers}, json.loads(body)))
        if endpoint.id in self.refuses:
            raise self.refuses[endpoint.id]
        assert sent is not None
        sent()
        future: asyncio.Future[PrefillAnswer] = asyncio.get_running_loop().create_future()
        self.futures.append((endpoint.id, future))
        return await future


class TogetherTest(Case):
    CONFIG: Mapping[str, Any] = {"connector": "sglang", "max_retries": 2}
    CONNECTOR = staticmethod(lambda: None)  # type: ignore[assignment]

    def setUp(self) -> None:
        super().setUp()
        self.router.ask_prefill = Ask()
        self.leg = self.router.prefill_leg = self.prefills = Prefills()  # type: ignore[assignment]
        self.aborted: list[tuple[str, str]] = []
        self.router.abort_leg = lambda endpoint, attempt: self.aborted.append((endpoint.id, attempt.legs.id))

    async def answers(self, found: PrefillAnswer | Exception, number: int = -1) -> None:
        """Have P answer."""
        future = self.prefills.futures[number][1]
        if isinstance(found, Exception):
            future.set_exception(found)
        else:
            future.set_result(found)
        for _ in range(5):
            await asyncio.sleep(0)

    def failed(self, forward: Forward, failure: Failure, status: int = 0, first: bool = True) -> None:
        """Have Envoy report what became of the attempt at the D that has it."""
        address = str(forward.answering.address)
        self.router.in_flight.attempt_failed(FailedAttempt(address, failure, forward.id, first, status))

    async def test_d_has_the_request_while_p_is_at_it(self) -> None:
        forward = await self.route()
        self.assertEqual(self.prefills.tried, ["p0"])
        self.assertEqual(self.router.registry.get("p0").in_flight, 1)
        own = {k: v for k, v in self.prefills.sent[0][3].items() if k != "stream"}
        self.assertEqual(decode_body(forward), own)
        self.assertEqual(own["bootstrap_host"], "10.0.0.1")
        self.assertEqual(forward.headers()["x-pd-prefill"], "p0")
        forward.release()
        await until(lambda: self.aborted and not self.router.registry.get("p0").in_flight)
        self.assertIdle()

    async def test_ps_answer_ends_its_part(self) -> None:
        forward = await self.route()
        await self.answers(COUNTED)
        self.assertEqual(self.router.registry.get("p0").in_flight, 0)
        self.assertEqual(self.router.registry.get("d0").in_flight, 1)
        self.assertTrue(forward.beside.sent)
        forward.release()
        self.assertIdle()
        await asyncio.sleep(0)
        self.assertEqual(self.aborted, [])
        self.assertEqual(forward.decision.prefill_attempts[0].outcome, "ok")

    async def test_a_p_that_refuses_the_connection_is_replaced_before_d_is_told(self) -> None:
        self.prefills.refuses["p0"] = PrefillFailed("connect")
        forward = await self.route()
        self.assertEqual(self.prefills.tried, ["p0", forward.prefill.id])
        forward.release()

    async def test_without_a_p_that_takes_it_nobody_serves_it(self) -> None:
        self.prefills.refuses = {f"p{n}": PrefillFailed("connect") for n in range(3)}
        self.assertRejected(await self.route(), 503, "no_prefill")
        self.assertIdle()

    async def test_no_p_at_all(self) -> None:
        self.down("p0", "p1", "p2")
        self.assertRejected(await self.route(), 503, "no_prefill")

    async def test_no_d_at_all(self) -> None:
        self.down("d0", "d1", "d2")
        self.assertRejected(await self.route(), 503, "no_decode")
        self.assertEqual(self.prefills.sent, [])

    async def test_what_cannot_be_split(self) -> None:
        self.assertRejected(await self.route({**BODY, "n": 2}), 501, "indivisible")
        self.assertIdle()

    async def test_a_p_that_fails_has_its_d_ended(self) -> None:
        for number, found in enumerate((answer(500), answer(503), PrefillFailed("reset", lost=True))):
            with self.subTest(found=found):
                forward = await self.route({**BODY, "prompt": f"{number}"})
                await self.answers(found)
                await until(lambda: self.aborted)
                name = forward.beside.attempt.legs.id
                self.assertEqual(self.aborted.pop(0), (forward.decode[0].id, name))
                self.assertEqual(forward.losses, int(isinstance(found, PrefillFailed)))
                forward.release()

    async def test_an_end_of_d_that_was_asked_for_is_not_its_fault(self) -> None:
        forward = await self.route()
        await self.answers(answer(500))
        self.failed(forward, Failure.STATUS, 500)
        self.assertEqual(forward.losses, 0)
        self.assertFalse(self.router.registry.get("d0").ejected)
        self.assertEqual(self.router.registry.get("d0").breaker.failures, 0)
        self.assertIs(self.router.in_flight.may_try_again(forward.id, 1), Retry.ALLOWED)
        forward.release()

    async def test_a_d_that_is_aborted_again_until_it_has_heard(self) -> None:
        """It may get the request after the abort."""
        self.enterContext(self.patched(REPEAT_S=0.0))
        forward = await self.route()
        await self.answers(answer(500))
        await until(lambda: len(self.aborted) > 2)
        forward.release()
        count = len(self.aborted)
        await asyncio.sleep(0.02)
        self.assertLessEqual(len(self.aborted), count + 1)

    @staticmethod
    def patched(**values: float) -> Any:
        return patch.multiple(together, **values)

    async def test_d_may_refuse_by_itself_what_p_has_refused(self) -> None:
        self.enterContext(self.patched(OWN_REFUSAL_S=0.05))
        forward = await self.route()
        await self.answers(answer(400))
        self.assertEqual(self.aborted, [])
        await until(lambda: self.aborted)
        self.assertIsNone(await self.router.again(forward.id, str(forward.decode[1].address), RAW))
        forward.release()

    async def test_a_further_attempt_has_a_prefill_of_its_own(self) -> None:
        forward = await self.route()
        first = forward.beside
        self.failed(forward, Failure.CONNECT)
        again = await self.router.again(forward.id, str(forward.answering.address), RAW)
        assert again is not None
        text, prefill = again
        self.assertEqual(self.prefills.tried, ["p0", prefill])
        self.assertIn(("p0", first.attempt.legs.id), self.aborted, "P of the first is ended")
        own = {k: v for k, v in self.prefills.sent[1][3].items() if k != "stream"}
        at = forward.splice.at
        self.assertEqual(json.loads(RAW[:at] + text), own)
        self.assertNotEqual(own["bootstrap_room"], self.prefills.sent[0][3]["bootstrap_room"])
        self.assertEqual(self.router.body_memory.used, len(RAW), "until P has it")
        await self.answers(COUNTED)
        self.assertEqual(self.router.body_memory.used, 0)
        forward.release()
        self.assertIdle()

    async def test_a_p_that_has_failed_is_not_asked_again(self) -> None:
        forward = await self.route()
        for number in range(3):
            await self.answers(answer(500))
            self.failed(forward, Failure.STATUS, 500, first=not number)
            again = await self.router.again(forward.id, str(forward.decode[0].address), RAW)
        self.assertIsNone(again)
        self.assertCountEqual(self.prefills.tried, ["p0", "p1", "p2"])
        forward.release()

    async def test_a_p_whose_hand_offs_are_left_out_at_d_is_not_chosen_for_it(self) -> None:
        forward = await self.route()
        self.failed(forward, Failure.CONNECT)
        d, registry = forward.answering, self.router.registry
        for name in ("p0", "p1"):
            registry.wrong_pairs.leave_out(registry.get(name), d, "wrong texts")
        again = await self.router.again(forward.id, str(d.address), RAW)
        assert again is not None
        self.assertEqual(again[1], "p2")
        forward.release()

    async def test_instances_that_encode_have_connectors_of_their_own(self) -> None:
        choice = ConnectorChoice("ec-example")
        instance = PDInstance("e0", InstanceRole.ENCODE, "10.0.0.3", 8000, connector=choice)
        self.router.register_instance(instance)
        self.router.registry.probed(self.router.registry.get("e0"), None)
        forward = await self.route()
        self.assertEqual(forward.prefill.id, "p0")
        forward.release()

    async def test_no_memory_for_a_body(self) -> None:
        forward = await self.route()
        self.router.body_memory.used = self.router.body_memory.limit
        self.assertIsNone(await self.router.again(forward.id, str(forward.decode[1].address), RAW))
        forward.release()

    async def test_an_unknown_request_or_d(self) -> None:
        forward = await self.route()
        self.assertIsNone(await self.router.again("no-1", str(forward.decode[1].address), RAW))
        self.assertIsNone(await self.router.again(forward.id, "10.9.9.9:1", RAW))
        self.assertEqual(len(self.prefills.sent), 1)
        forward.release()

    async def test_a_client_that_leaves_during_routing(self) -> None:
        held = asyncio.get_running_loop().create_future()
        self.router.prefill_leg = lambda *_: held  # type: ignore[assignment]
        request = asyncio.ensure_future(self.route())
        await until(lambda: self.router.registry.get("p0").in_flight)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await until(lambda: not self.router.registry.get("p0").in_flight)
        self.assertEqual([name for name, _ in self.aborted], ["p0"])

    async def test_a_gateway_tries_once(self) -> None:
        forward = await self.route()
        self.assertEqual(forward.gateway_headers()["x-envoy-max-retries"], "0")
        forward.for_gateway(True)
        self.assertEqual(len(forward.decode), 1)
        forward.release()


class MixedTest(Case):
    """A fleet with instances of both engines."""

    CONFIG: Mapping[str, Any] = {"connector": "nixl"}
    CONNECTOR = staticmethod(lambda: None)  # type: ignore[assignment]

    def setUp(self) -> None:
        super().setUp()
        self.router.ask_prefill = Ask()
        for number in range(3):
            self.router.unregister_instance(f"d{number}")
            choice = ConnectorChoice("sglang") if number else None
            instance = PDInstance(f"d{number}", D, "10.0.0.2", 8000 + number, connector=choice)
            self.router.register_instance(instance)
        for endpoint in self.router.registry:
            self.router.registry.probed(endpoint, None)

    async def test_what_is_not_split_goes_to_those_that_serve_it_alone(self) -> None:
        for _ in range(3):
            forward = await self.route({**BODY, "n": 2})
            self.assertEqual([each.id for each in forward.decode], ["d0"])
            forward.release()

    async def test_a_hand_off_has_no_further_attempt_at_the_others(self) -> None:
        for _ in range(3):
            forward = await self.route()
            self.assertEqual([each.id for each in forward.decode], ["d0"])
            self.assertEqual(forward.prefill.instance.role, P)
            forward.release()
