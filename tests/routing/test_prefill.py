"""What becomes of a request whose prefill fails, with a prefill leg that is no I/O."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any
from unittest import mock

from tests.support.in_flight import InFlightCase
from tests.support.routing import BODY, ERROR, Case, D, P, answer
from vllm_pd_scheduler.fleet import condition
from vllm_pd_scheduler.handoff.interfaces import PrefillAnswer, PrefillFailed
from vllm_pd_scheduler.models import InstanceRole
from vllm_pd_scheduler.request.errors import Reject
from vllm_pd_scheduler.routing.attempts import FailedAttempt, Failure, Retry
from vllm_pd_scheduler.routing.lost import PAUSE_S


class PrefillFailsTest(Case):
    CONFIG: Mapping[str, Any] = {"max_retries": 1}

    async def test_another_p_is_tried(self) -> None:
        cases: list[tuple[PrefillAnswer | Exception, str]] = [
            (answer(500, ERROR), "status_500"),
            (answer(503, ERROR), "status_503"),
            (answer(429, ERROR), "status_429"),
            (answer(408, ERROR), "status_408"),
            (answer(302, ERROR), "status_302"),
            (PrefillFailed("connect"), "connect"),
            (PrefillFailed("timeout"), "timeout"),
            (PrefillFailed("reset"), "reset"),
            (PrefillFailed("hung", lost=True), "hung"),
        ]
        for failure, reason in cases:
            with self.subTest(reason):
                self.setUp()
                self.leg.answers = {"p0": failure}
                forward = await self.route()
                self.assertEqual(len(self.leg.tried), 2)
                self.assertNotEqual(self.leg.tried[1], "p0")
                self.assertSplit(forward, self.leg.tried[1])
                self.assertEqual(
                    self.count("pd_scheduler_prefill_failures_total", prefill="p0", reason=reason), 1.0
                )
                forward.release()
                self.assertIdle()

    async def test_max_retries_then_decode_prefills(self) -> None:
        self.fail_all(answer(500, ERROR))
        forward = await self.route()
        self.assertLocal(forward)
        self.assertEqual(len(set(self.leg.tried)), 2)
        self.assertEqual(self.count("pd_scheduler_requests_total", decode="d0", served="local"), 1.0)
        forward.release()
        self.assertIdle()

    async def test_what_p_refuses_is_decodes_to_refuse(self) -> None:
        """P was asked another request: for one token, not streamed."""
        for status in (400, 401, 403, 404, 413, 422):
            with self.subTest(status):
                self.setUp()
                self.leg.answers = {"p0": answer(status, ERROR)}
                self.assertLocal(await self.route())
                self.assertEqual(self.leg.tried, ["p0"])

    async def test_a_p_that_does_not_take_its_key_is_replaced(self) -> None:
        """The key is the scheduler's, not the client's."""
        for status in (401, 403):
            with self.subTest(status), mock.patch.object(Case, "KEYS", {"p0": "old"}):
                self.setUp()
                self.leg.answers = {"p0": answer(status, ERROR)}
                forward = await self.route()
                self.assertSplit(forward, self.leg.tried[1])
                reason = f"status_{status}"
                self.assertEqual(
                    self.count("pd_scheduler_prefill_failures_total", prefill="p0", reason=reason), 1.0
                )
                forward.release()

    async def test_an_answer_without_a_hand_off_lets_decode_prefill(self) -> None:
        for found in (
            answer(params=None),
            answer(params={"do_remote_prefill": True}),
            answer(body=b"not json"),
        ):
            with self.subTest(found.body[:30]):
                self.setUp()
                self.leg.answers = {"p0": found}
                forward = await self.route()
                self.assertSplit(forward, self.leg.tried[1])
                reason = "no_handoff"
                self.assertEqual(
                    self.count("pd_scheduler_prefill_failures_total", prefill="p0", reason=reason), 1.0
                )
                forward.release()
                self.assertIdle()

    async def test_a_p_that_hands_nothing_over_is_named_once(self) -> None:
        for each in ("p0", "p1", "p2"):
            self.leg.answers[each] = answer(params=None)
        with self.assertLogs("vllm_pd_scheduler.routing.prefill_ends", "WARNING") as logs:
            for _ in range(2):
                (await self.route()).release()
        (line,) = logs.output
        self.assertRegex(
            line, "p[0-2]: no hand-off in its answer: has it a --kv-transfer-config, with the conn"
        )

    async def test_a_leg_that_breaks_reserves_nothing(self) -> None:
        self.fail_all(RuntimeError("a bug"))
        with self.assertRaisesRegex(RuntimeError, "a bug"):
            await self.route()
        self.assertIdle()


class NeverTwiceTest(Case):
    CONFIG: Mapping[str, Any] = {"max_retries": 9, "strategy": "least_load"}

    async def test_no_p_is_tried_twice(self) -> None:
        self.fail_all(PrefillFailed("connect"))
        forward = await self.route()
        self.assertLocal(forward)
        self.assertEqual(sorted(self.leg.tried), ["p0", "p1", "p2"])


class NoRetriesTest(Case):
    CONFIG: Mapping[str, Any] = {"max_retries": 0}

    async def test_one_attempt_and_one_d(self) -> None:
        self.fail_all(answer(500, ERROR))
        forward = await self.route()
        self.assertLocal(forward)
        self.assertEqual(self.leg.tried, ["p0"])
        self.assertEqual(len(forward.decode), 1)


class DecodeMayNotPrefillTest(Case):
    CONFIG: Mapping[str, Any] = {"on_prefill_failure": "fail", "max_retries": 2}

    async def test_two_that_refuse_alike_are_believed(self) -> None:
        self.fail_all(answer(404, ERROR))
        outcome = await self.route()
        self.assertRejected(outcome, 404, "prefill_4xx")
        self.assertEqual(outcome.body, ERROR)
        self.assertEqual(len(self.leg.tried), 2)

    async def test_what_a_client_needs_comes_with_their_word(self) -> None:
        told = {"access-control-allow-origin": "https://app.example", "vary": "Origin"}
        self.fail_all(PrefillAnswer(401, "text/plain", ERROR, headers=told))
        outcome = await self.route()
        self.assertEqual(outcome.headers, {**told, "content-type": "text/plain"})

    async def test_one_that_refuses_alone_is_not(self) -> None:
        self.leg.answers = {"p0": answer(404, ERROR)}
        forward = await self.route()
        self.assertSplit(forward, self.leg.tried[1])

    async def test_a_p_without_a_hand_off_is_no_way_round(self) -> None:
        self.fail_all(answer(params=None))
        self.assertRejected(await self.route(), 503, "no_prefill")
        self.assertEqual(len(self.leg.tried), 3)


class NoHandoffTest(Case):
    CONFIG: Mapping[str, Any] = {"max_local_prefill_share": 0.02}

    async def test_a_p_without_its_connector_is_ejected_with_the_reason(self) -> None:
        self.leg.answers = {"p0": answer(params=None)}
        p0 = self.router.registry.get("p0")
        while not p0.ejected:
            (await self.route()).release()
        self.assertIn("--kv-transfer-config", condition.reason(p0))

    async def test_a_prompt_whose_first_token_ends_the_text_is_no_failure(self) -> None:
        """Releases before 0.32 hand nothing over then. It counts neither against P nor in the share."""
        body = b'{"choices":[{"finish_reason":"stop"}],"kv_transfer_params":null}'
        self.fail_all(answer(body=body))
        for _ in range(20):
            forward = await self.route()
            self.assertLocal(forward)
            forward.release()
        self.assertEqual(len(self.router.registry.routable(P)), 3)


class OverloadTest(Case):
    CONFIG: Mapping[str, Any] = {"max_retries": 2, "queue_timeout": 5.0}

    async def test_one_that_is_full_is_passed_over_and_not_ejected(self) -> None:
        self.leg.answers = {"p0": answer(503, ERROR)}
        for _ in range(12):
            forward = await self.route()
            self.assertNotEqual(forward.prefill.id, "p0")
            forward.release()
        self.assertEqual(len(self.router.registry.routable(P)), 3)
        self.assertLess(self.leg.tried.count("p0"), 5, "it is left alone for a while")

    async def test_when_all_are_full_the_request_waits(self) -> None:
        self.fail_all(answer(429, ERROR))
        waiting = asyncio.ensure_future(self.route())
        while len(self.leg.tried) < 3:  # noqa: ASYNC110 - no event: the leg is a fake
            await asyncio.sleep(0)
        self.leg.answers = {}
        self.assertSplit(await waiting, self.leg.tried[3])


class WaitingLossTest(Case):
    CONFIG: Mapping[str, Any] = {"max_in_flight_tokens": 1, "queue_size": 8}

    async def test_what_waits_meanwhile_has_no_third(self) -> None:
        self.leg.hold = asyncio.Event()
        self.fail_all(PrefillFailed("reset", lost=True))
        tasks = [asyncio.ensure_future(self.route()) for _ in range(6)]
        while len(self.router.dispatcher.queue) < 3:  # noqa: ASYNC110 - no event: the leg is a fake
            await asyncio.sleep(0)
        self.assertEqual(len(self.leg.tried), 3)
        self.leg.hold.set()
        for found in await asyncio.gather(*tasks):
            self.assertEqual((found.status, found.reason), (503, "lost"))
        self.assertLessEqual(len(self.leg.tried), 4, "one is tried again; those that wait are sent nowhere")
        self.assertIdle()

    async def test_at_decode_too(self) -> None:
        whole = {**BODY, "n": 2}
        forwards = [await self.route(whole) for _ in range(3)]
        waiting = asyncio.ensure_future(self.route(whole))
        while not self.router.dispatcher.queue:  # noqa: ASYNC110 - no event: the leg is a fake
            await asyncio.sleep(0)
        for forward in forwards:
            d = forward.decode[0]
            self.router.in_flight.attempt_failed(FailedAttempt(str(d.address), Failure.RESET, forward.id))
            forward.release()
        found = await waiting
        self.assertEqual((found.status, found.reason), (503, "lost"))
        self.assertIdle()


class LossTest(Case):
    CONFIG: Mapping[str, Any] = {"max_retries": 9}

    async def test_what_two_have_lost_is_not_tried_again(self) -> None:
        self.fail_all(PrefillFailed("reset", lost=True))
        self.assertRejected(await self.route(), 503, "lost")
        self.assertEqual(len(self.leg.tried), 2)
        self.leg.answers = {}
        self.assertEqual((await self.route()).reason, "lost")
        self.assertEqual(len(self.leg.tried), 2, "its prompt is refused for a while")
        other = await self.route({**BODY, "prompt": "another one"})
        self.assertIsNotNone(other.prefill)

    async def test_those_that_come_at_once_have_no_third_either(self) -> None:
        """Each of two has lost an instance; neither has had two."""
        self.fail_all(PrefillFailed("reset", lost=True))
        self.leg.hold = asyncio.Event()
        tasks = [asyncio.ensure_future(self.route()) for _ in range(2)]
        while len(self.leg.tried) < 2:  # noqa: ASYNC110 - no event: the leg is a fake
            await asyncio.sleep(0)
        self.assertEqual(len(set(self.leg.tried)), 2)
        self.leg.hold.set()
        for found in await asyncio.gather(*tasks):
            self.assertEqual((found.status, found.reason), (503, "lost"))
        self.assertEqual(len(set(self.leg.tried)), 2)
        self.assertIdle()

    async def test_nor_at_decode(self) -> None:
        in_flight = self.router.in_flight
        forwards = [await self.route() for _ in range(2)]
        for forward in forwards:
            d = forward.decode[0]
            in_flight.attempt_failed(FailedAttempt(str(d.address), Failure.RESET, forward.id))
        self.assertEqual([in_flight.may_try_again(each.id, 1) for each in forwards], [Retry.LOST] * 2)

    async def test_a_prompt_that_was_refused_may_have_one_instance(self) -> None:
        self.fail_all(PrefillFailed("reset", lost=True))
        await self.route()
        for pause in (PAUSE_S, 2 * PAUSE_S):
            before, self.ahead = len(self.leg.tried), self.ahead + pause
            answer = await self.route()
            self.assertEqual((answer.status, answer.reason), (503, "lost"))
            self.assertEqual(answer.headers["retry-after"], f"{2 * pause:g}")
            self.assertEqual(len(self.leg.tried), before + 1)
        self.ahead += 4 * PAUSE_S
        self.leg.answers = {}
        forward = await self.route()
        in_flight, (d, *_) = self.router.in_flight, forward.decode
        in_flight.attempt_failed(FailedAttempt(str(d.address), Failure.RESET, forward.id))
        self.assertIs(in_flight.may_try_again(forward.id, 1), Retry.LOST, "at decode too")

    async def test_nor_may_a_d_that_serves_it_alone(self) -> None:
        self.fail_all(PrefillFailed("reset", lost=True))
        await self.route()
        self.ahead += PAUSE_S
        self.fail_all(PrefillFailed("connect"))
        forward = await self.route()
        self.assertLocal(forward)
        in_flight, (d, *_) = self.router.in_flight, forward.decode
        in_flight.attempt_failed(FailedAttempt(str(d.address), Failure.RESET, forward.id))
        self.assertIs(in_flight.may_try_again(forward.id, 1), Retry.LOST)

    async def test_what_was_not_delivered_may_be_tried_everywhere(self) -> None:
        self.fail_all(PrefillFailed("connect"))
        self.assertLocal(await self.route())
        self.assertEqual(len(self.leg.tried), 3)

    async def test_decode_counts_too(self) -> None:
        """One lost at P: a D that loses it also was the last."""
        self.leg.answers = {"p0": PrefillFailed("reset", lost=True)}
        forward = await self.route()
        in_flight = self.router.in_flight
        self.assertIsNone(in_flight.may_try_again(forward.id, 1), "it is not known yet")
        d = forward.decode[0]
        in_flight.attempt_failed(FailedAttempt(str(d.address), Failure.RESET, forward.id))
        self.assertIs(in_flight.may_try_again(forward.id, 1), Retry.LOST)

    async def test_at_decode(self) -> None:
        forward = await self.route()
        in_flight, (first, second, *_) = self.router.in_flight, forward.decode
        in_flight.attempt_failed(FailedAttempt(str(first.address), Failure.CONNECT, forward.id))
        self.assertIs(in_flight.may_try_again(forward.id, 1), Retry.ALLOWED)
        in_flight.attempt_failed(FailedAttempt(str(second.address), Failure.RESET, forward.id, False))
        self.assertIs(in_flight.may_try_again(forward.id, 2), Retry.LAST, "one is lost")
        in_flight.attempt_failed(FailedAttempt(str(first.address), Failure.RESET, forward.id, False))
        self.assertIs(in_flight.may_try_again(forward.id, 3), Retry.LOST)
        self.assertIs(in_flight.may_try_again(f"{forward.id}9", 1), Retry.LOST, "it has ended")


class SlowFleetTest(Case):
    CONFIG: Mapping[str, Any] = {"decode_first_byte_timeout": 2.0}

    async def test_time_outs_of_all_are_not_tried_elsewhere_and_make_the_limit_longer(self) -> None:
        in_flight, allowed = self.router.in_flight, 0
        for _ in range(20):
            forward = await self.route({**BODY, "stream": True})
            d = forward.decode[0]
            in_flight.attempt_failed(FailedAttempt(str(d.address), Failure.TIMEOUT, forward.id))
            allowed += in_flight.may_try_again(forward.id, 1) is Retry.ALLOWED
            forward.release()
        self.assertLess(allowed, 10, "each would be work for an instance that has too much")
        self.assertEqual(len(self.router.registry.routable(D)), 3, "none hangs more than the others")
        forward = await self.route({**BODY, "stream": True})
        self.assertGreater(forward.first_byte_timeout, 4.0)
        forward.release()

    async def test_one_that_hangs_is_found(self) -> None:
        in_flight, d0 = self.router.in_flight, self.router.registry.get("d0")
        for _ in range(40):
            forward = await self.route({**BODY, "stream": True})
            if forward.decode[0] is d0:
                in_flight.attempt_failed(FailedAttempt(str(d0.address), Failure.TIMEOUT, forward.id))
                self.assertIs(in_flight.may_try_again(forward.id, 1), Retry.ALLOWED)
            forward.release()
            in_flight.ended.settle(0.0)
        self.assertTrue(d0.ejected)
        self.assertEqual(forward.first_byte_timeout, 2.0)

    async def test_all_that_wait_at_one_that_hangs_are_tried_elsewhere(self) -> None:
        """However many they are: the budget for retries is for a fleet that is slow."""
        in_flight, waiting = self.router.in_flight, []
        for _ in range(90):
            waiting.append(await self.route({**BODY, "stream": True}))
        hung = [forward for forward in waiting if forward.decode[0] is self.router.registry.get("d0")]
        self.assertGreater(len(hung), 20)
        for forward in waiting:
            if forward not in hung:
                forward.release()
        for forward in hung:
            address = str(forward.decode[0].address)
            in_flight.attempt_failed(FailedAttempt(address, Failure.TIMEOUT, forward.id))
            self.assertIs(in_flight.may_try_again(forward.id, 1), Retry.ALLOWED)
            forward.release()
        self.assertEqual(in_flight.patience.factor, 1.0, "the others are not slow")


class OnPrefillFailureTest(InFlightCase):
    async def reject(self) -> Reject:
        raw = json.dumps(BODY).encode()
        outcome = await self.router.route({":method": "POST", ":path": "/v1/completions"}, raw)
        assert isinstance(outcome, Reject), outcome
        return outcome

    async def test_fail(self) -> None:
        self.router = self.start(on_prefill_failure="fail")
        for endpoint in self.router.registry.endpoints(InstanceRole.PREFILL):
            self.router.drain_instance(endpoint.id)
        outcome = await self.reject()
        self.assertEqual((outcome.status, outcome.reason), (503, "no_prefill"))
        self.assertIn("retry-after", outcome.headers)

    async def test_local_for_a_share_of_the_requests(self) -> None:
        self.router = self.start(max_local_prefill_share=0.02)
        for endpoint in self.router.registry.endpoints(InstanceRole.PREFILL):
            self.router.drain_instance(endpoint.id)
        for _ in range(2):
            self.assertIsNone((await self.forward()).pending)
        self.assertEqual((await self.reject()).status, 503)
