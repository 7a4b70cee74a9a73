"""P for a sidecar: it is named in a header, never called, and counted as well as that can be known."""

import asyncio
import unittest
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.routing import BODY, Case, D, P
from tests.support.waiting import HUNG_S
from vllm_pd_scheduler.fleet.condition import reason
from vllm_pd_scheduler.models import InstanceState, MetricsSnapshot
from vllm_pd_scheduler.records.decision import OK
from vllm_pd_scheduler.request.errors import Reject
from vllm_pd_scheduler.routing.attempts import FailedAttempt, Failure
from vllm_pd_scheduler.routing.result import Result
from vllm_pd_scheduler.telemetry import Ending

STREAM = {**BODY, "stream": True}


class SidecarCase(Case):
    CONFIG: Mapping[str, Any] = {"prefill_leg": "sidecar"}

    def setUp(self) -> None:
        self.timers: list[tuple[float, Callable[[], None]]] = []
        super().setUp()

    def clock(self) -> float:
        return 1000.0 + self.ahead  # which stands still, however slow the machine is

    def later(self, delay: float, call: Callable[[], None]) -> object:
        self.timers.append((self.ahead + delay, call))
        return None

    def let_pass(self, seconds: float) -> None:
        """Let time pass, and call what is due."""
        self.ahead += seconds
        due = [timer for timer in self.timers if timer[0] <= self.ahead]
        self.timers = [timer for timer in self.timers if timer[0] > self.ahead]
        for _, call in due:
            call()

    def busy(self) -> dict[str, int]:
        return {endpoint.id: endpoint.in_flight for endpoint in self.router.registry if endpoint.in_flight}

    def fails(self, forward: Any, failure: Failure, status: int = 0) -> None:
        address = str(forward.decode[0].address)
        self.router.in_flight.attempt_failed(FailedAttempt(address, failure, forward.id, status=status))


class NamedTest(SidecarCase):
    async def test_p_is_named_and_not_called(self) -> None:
        forward = await self.route(x_request_id="id-1")
        found = forward.headers()
        self.assertEqual(found["x-prefiller-host-port"], "10.0.0.1:8000")
        self.assertEqual(found["x-pd-prefill"], "p0")
        self.assertTrue(found["x-gateway-destination-endpoint"].startswith("10.0.0.2:8000"))
        self.assertIsNone(forward.body, "the client's own bytes")
        self.assertIsNone(forward.splice)
        self.assertEqual(self.leg.sent, [])
        self.assertEqual(self.busy(), {"p0": 1, "d0": 1})
        self.assertEqual(self.count("pd_scheduler_requests_total", decode="d0", served="split"), 1.0)
        forward.release()
        self.assertIdle()

    async def test_what_is_not_split_has_no_p(self) -> None:
        for body, path, method in (
            ({**BODY, "n": 2}, "/v1/completions", "POST"),
            ({"input": "x"}, "/v1/embeddings", "POST"),
            (b"", "/v1/models", "GET"),
        ):
            forward = await self.route(body, path, method)
            self.assertNotIn("x-prefiller-host-port", forward.headers())
            self.assertNotIn("p0", self.busy())
            forward.release()

    async def test_disaggregation_decides_as_it_does_without_a_sidecar(self) -> None:
        for setting, has_p in (("never", False), (10**6, False), (1, True), ("always", True)):
            self.router.config.__dict__["disaggregation"] = setting
            forward = await self.route()
            self.assertEqual("x-prefiller-host-port" in forward.headers(), has_p, setting)
            forward.release()

    async def test_no_p(self) -> None:
        self.down("p0", "p1", "p2")
        forward = await self.route()
        self.assertLocal(forward)
        self.assertEqual(self.count("pd_scheduler_requests_total", decode="d0", served="local"), 1.0)
        forward.release()

    async def test_no_p_where_d_may_not_prefill(self) -> None:
        self.router.config.__dict__["on_prefill_failure"] = "fail"
        self.down("p0", "p1", "p2")
        self.assertRejected(await self.route(), 503, "no_prefill")

    async def test_only_a_d_that_fits_p_asks_it(self) -> None:
        self.assertIsNone((await self.route()).only)
        for name, revision in (("p0", "a"), ("p1", "a"), ("p2", "a"), ("d0", "a"), ("d1", "b"), ("d2", "b")):
            instance = replace(self.router.registry.get(name).instance, revision=revision)
            self.router.registry.describe(name, instance)
        forward = await self.route()
        self.assertEqual([each.id for each in forward.only], ["d0"])
        self.assertGreater(len(forward.decode), 1, "others prefill themselves")

    async def test_no_d(self) -> None:
        self.down("d0", "d1", "d2")
        self.assertRejected(await self.route(), 503, "no_decode")

    async def test_a_change_while_it_runs(self) -> None:
        config = self.router.config.model_copy(update={"prefill_leg": "scheduler"})
        self.router.reconfigure(config, ["prefill_leg"])
        forward = await self.route()
        self.assertNotIn("x-prefiller-host-port", forward.headers())
        self.assertEqual(self.leg.tried, ["p0"])
        forward.release()

    async def test_a_hand_off_of_the_clients_is_cut_out_all_the_same(self) -> None:
        forward = await self.route({**BODY, "kv_transfer_params": {"remote_host": "evil"}})
        self.assertIn("x-prefiller-host-port", forward.headers())
        self.assertNotIn(b"kv_transfer_params", forward.body)
        forward.release()

    async def test_the_prefill_has_its_time_too(self) -> None:
        forward = await self.route(STREAM)
        config = self.router.config
        expected = config.decode_first_byte_timeout + config.prefill_timeout
        self.assertEqual(forward.first_byte_timeout, expected)
        forward.release()


class SteeringTest(Case):
    """In every mode: nobody but the scheduler names whom a sidecar asks."""

    STEERING: Mapping[str, str] = {
        "x-prefiller-host-port": "10.9.9.9:1",
        "x-encoder-hosts-ports": "10.9.9.9:1",
        "x-kv-cache-source-host-port": "10.9.9.9:1",
        "x-data-parallel-host-port": "10.9.9.9:1",
        "x-data-parallel-rank": "3",
    }

    async def test_a_clients_own_are_removed(self) -> None:
        for leg in ("scheduler", "sidecar"):
            self.router.config.__dict__["prefill_leg"] = leg
            for body, path, method in (
                (BODY, "/v1/completions", "POST"),
                ({**BODY, "n": 2}, "/v1/completions", "POST"),
                ({"input": "x"}, "/v1/responses", "POST"),
                (b"", "/v1/models", "GET"),
            ):
                with self.subTest(leg, path=path):
                    forward = await self.route(body, path, method, **self.STEERING)
                    self.assertEqual(set(forward.remove_headers), set(self.STEERING))
                    self.assertNotIn("10.9.9.9:1", forward.headers().values())
                    forward.release()


class AccountingTest(SidecarCase):
    async def test_until_the_time_that_was_predicted(self) -> None:
        forward = await self.route()
        predicted = forward.sidecar.predicted
        self.let_pass(predicted * 0.5)
        self.assertEqual(self.busy(), {"p0": 1, "d0": 1})
        self.let_pass(predicted)
        self.assertEqual(self.busy(), {"d0": 1})
        p = self.router.registry.get("p0")
        self.assertEqual((p.pending_handoffs, p.prefill.queued), (1, 0.0), "until D has fetched it")
        forward.release()
        self.assertEqual(p.pending_handoffs, 0)
        self.assertIdle()

    async def test_until_a_stream_begins_if_that_will_be_told(self) -> None:
        forward = await self.route(STREAM)
        forward.sidecar.begins_told = True
        self.let_pass(forward.sidecar.predicted * 3)
        self.assertEqual(self.busy(), {"p0": 1, "d0": 1}, "it takes longer than predicted")
        self.router.in_flight.answer_began(forward, 200)
        self.assertEqual(self.busy(), {"d0": 1})
        self.router.in_flight.answer_began(forward, 200)
        forward.release()
        self.assertIdle()

    async def test_until_the_end_at_the_latest(self) -> None:
        forward = await self.route(STREAM)
        forward.sidecar.begins_told = True
        forward.release()
        self.assertIdle()
        self.let_pass(1000.0)
        self.assertIdle()
        self.router.in_flight.answer_began(forward, 200)
        self.assertIdle()

    async def test_until_an_attempt_has_failed(self) -> None:
        for failure in Failure:
            with self.subTest(failure):
                forward = await self.route(STREAM)
                self.fails(forward, failure, 500)
                self.assertFalse(forward.sidecar.reservation.active)
                forward.release()
                self.assertIdle()

    async def test_until_an_error_begins_of_which_nothing_is_learned(self) -> None:
        forward = await self.route(STREAM)
        p = forward.sidecar.endpoint
        before = p.prefill.cost(1000, 1000)
        self.ahead += 60.0
        self.router.in_flight.answer_began(forward, 502)
        self.assertEqual(self.busy(), {"d0": 1})
        self.assertEqual(p.prefill.cost(1000, 1000), before)
        self.assertEqual(forward.decision.prefill_attempts[0].outcome, "status_502")
        forward.release()

    async def test_a_p_that_was_restarted_counts_nothing_of_before(self) -> None:
        forward = await self.route()
        registry = self.router.registry
        p = registry.get("p0")
        registry.started(p, 1.0)
        registry.started(p, 2.0)
        self.assertEqual(p.in_flight, 0)
        self.let_pass(1000.0)
        forward.release()
        self.assertEqual((p.in_flight, p.pending_handoffs), (0, 0))

    async def test_a_client_that_leaves_before_envoy_has_the_answer(self) -> None:
        forward = await self.route()
        self.router.in_flight.unused(forward)
        self.assertIdle()
        self.assertEqual(self.router.registry.get("p0").pending_handoffs, 0)


class WaitingTest(SidecarCase):
    """Who waits for P is served when the claim of another one ends, whatever ends it."""

    CONFIG: Mapping[str, Any] = {"prefill_leg": "sidecar", "max_in_flight_tokens": 1_000}

    async def test_each_end_wakes(self) -> None:
        body = {**STREAM, "prompt": "long " * 2_000, "max_tokens": 1}
        for end in ("expired", "began", "failed", "released"):
            with self.subTest(end):
                self.setUp()
                self.down("p1", "p2")
                first = await self.route(body)
                first.sidecar.begins_told = end != "expired"
                second = asyncio.ensure_future(self.route({**body, "prompt": "other " * 2_000}))
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                self.assertFalse(second.done())
                if end == "expired":
                    self.let_pass(first.sidecar.predicted)
                elif end == "began":
                    self.router.in_flight.answer_began(first, 200)
                elif end == "failed":
                    self.fails(first, Failure.STATUS, 502)
                else:
                    first.release()
                forward = await asyncio.wait_for(second, HUNG_S)
                self.assertEqual(forward.prefill.id, "p0")
                first.release()
                forward.release()


class LearningTest(SidecarCase):
    def serving(self, waiting: float = 0.0) -> None:
        """Have D scraped, with so many requests in its queue."""
        for endpoint in self.router.registry.endpoints(D):
            snapshot = MetricsSnapshot(running=1.0, waiting=waiting, kv_usage=0.1, taken_at=0.0)
            self.router.registry.scraped(endpoint, snapshot, 0)

    async def learned(self, forward: Any, told: Callable[[Any], None]) -> float:
        """How many times longer a prefill is predicted to take after an answer that began late."""
        p = forward.sidecar.endpoint
        before = p.prefill.cost(1000, 1000)
        self.let_pass(0.1)
        told(forward)
        forward.release()
        return float(p.prefill.cost(1000, 1000) / before)

    async def test_from_when_a_stream_begins(self) -> None:
        self.serving()
        forward = await self.route(STREAM)
        forward.sidecar.begins_told = True
        self.assertGreater(await self.learned(forward, self.began), 1.0)
        self.assertEqual(forward.decision.prefill_attempts[0].outcome, OK)

    def began(self, forward: Any) -> None:
        self.router.in_flight.answer_began(forward, 200)

    def told(self, forward: Any) -> None:
        address = str(forward.decode[0].address)
        self.router.in_flight.told(Result(forward.id, Ending.OK, 200, 9.0, 0.11, 0.01, address))

    async def test_from_the_time_to_the_first_token_that_is_told_at_the_end(self) -> None:
        self.serving()
        self.assertGreater(await self.learned(await self.route(STREAM), self.told), 1.0)

    async def test_not_from_one_that_has_waited_behind_another(self) -> None:
        self.serving()
        self.down("p1", "p2")
        first = await self.route(STREAM)
        self.assertEqual(await self.learned(await self.route(STREAM), self.told), 1.0)
        first.release()

    async def test_not_from_an_answer_that_comes_whole(self) -> None:
        self.serving()
        for told in (self.began, self.told):
            self.assertEqual(await self.learned(await self.route(), told), 1.0)

    async def test_not_from_a_d_with_a_queue(self) -> None:
        self.serving(waiting=3.0)
        for told in (self.began, self.told):
            self.assertEqual(await self.learned(await self.route(STREAM), told), 1.0)


class EjectionTest(SidecarCase):
    """A sidecar gives P's errors as if they were D's: who differs from its peers is at fault."""

    async def serve(self, count: int, broken: str) -> None:
        for _ in range(count):
            forward = await self.route()
            prefill, decode = forward.prefill.id, forward.decode[0].id
            if broken in (prefill, decode):
                self.fails(forward, Failure.STATUS, 502)
            forward.release()
            self.router.in_flight.ended.settle(0.0)

    def out(self) -> set[str]:
        return {e.id for e in self.router.registry if e.state is not InstanceState.HEALTHY}

    def mix(self) -> None:
        """Have every P meet every D in turn: with three of both they would come in the same pairs."""
        self.router.unregister_instance("d2")

    async def test_a_broken_p_is_ejected_and_no_d(self) -> None:
        self.mix()
        await self.serve(60, "p1")
        self.assertEqual(self.out(), {"p1"})
        self.assertIn("prefill or decode", reason(self.router.registry.get("p1")))

    async def test_a_broken_d_is_ejected_and_no_p(self) -> None:
        self.mix()
        await self.serve(60, "d1")
        self.assertEqual(self.out(), {"d1"})

    async def test_two_that_are_always_together(self) -> None:
        """Three in turn of both: p1 is always with d1."""
        await self.serve(30, "p1")
        self.assertEqual(self.out(), {"p1"})

    async def test_two_that_are_always_together_and_it_is_d(self) -> None:
        """Its P goes first, and then it is with another one."""
        await self.serve(60, "d1")
        self.assertIn("d1", self.out())
        self.assertFalse(self.out() & {"d0", "d2"})

    async def test_one_that_cannot_be_connected_is_d(self) -> None:
        for _ in range(9):
            forward = await self.route()
            if forward.decode[0].id == "d0":
                self.fails(forward, Failure.CONNECT)
            forward.release()
            self.router.in_flight.ended.settle(0.0)
        self.assertEqual(self.out(), {"d0"})

    async def test_a_full_answer_leaves_nobody_alone(self) -> None:
        """It may be of either: were each D paused for each, one P would close them all."""
        forward = await self.route()
        self.fails(forward, Failure.OVERLOADED, 503)
        self.assertEqual([e.id for e in self.router.registry if e.pause.until], [])
        forward.release()

    async def test_a_further_attempt_is_d_alone(self) -> None:
        """Envoy makes it without the header, so that its end says nothing of P."""
        forward = await self.route()
        in_flight, p = self.router.in_flight, forward.sidecar.endpoint
        self.fails(forward, Failure.STATUS, 502)
        share = p.doubts._share
        address = str(forward.decode[1].address)
        attempt = FailedAttempt(address, Failure.STATUS, forward.id, first=False, status=502)
        in_flight.attempt_failed(attempt)
        self.assertEqual(p.doubts._share, share)
        forward.release()

    async def test_a_prompt_that_ends_engines_of_p(self) -> None:
        """P's death is told by its probe; the request that was answered 502 then counts as lost there."""
        for _ in range(2):
            forward = await self.route()
            self.fails(forward, Failure.STATUS, 502)
            self.down(forward.prefill.id)
            forward.release()
        self.assertRejected(await self.route(), 503, "lost")


class AnyOrderTest(unittest.TestCase):
    """Whatever is told, and in whichever order: when all have ended, nothing is left on anybody."""

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["route", "began", "error", "failed", "told", "release", "pass", "unused"]),
                st.integers(0, 5),
                st.booleans(),
            ),
            max_size=40,
        )
    )
    def test_nothing_stays(self, events: list[tuple[str, int, bool]]) -> None:
        asyncio.run(self.play(SidecarCase("setUp"), events))

    async def play(self, case: SidecarCase, events: list[tuple[str, int, bool]]) -> None:
        case.setUp()
        in_flight, forwards = case.router.in_flight, []
        for kind, number, flag in events:
            if kind == "route":
                forward = await case.route(STREAM if flag else BODY)
                if not isinstance(forward, Reject):
                    forward.sidecar.begins_told = flag
                    forwards.append(forward)
            elif kind == "pass":
                case.let_pass(number * 0.02)
            elif forwards:
                forward = forwards[number % len(forwards)]
                if kind in ("began", "error"):
                    in_flight.answer_began(forward, 200 if kind == "began" else 500)
                elif kind == "failed":
                    attempt = FailedAttempt(
                        str(forward.decode[0].address), list(Failure)[number], forward.id, first=flag
                    )
                    in_flight.attempt_failed(attempt)
                elif kind == "told":
                    address = str(forward.decode[0].address)
                    in_flight.told(Result(forward.id, Ending.OK, 200, 1.0, 0.5, 0.1, address))
                elif kind == "unused":
                    in_flight.unused(forward)
                else:
                    forward.release()
            for endpoint in case.router.registry:
                self.assertGreaterEqual(endpoint.in_flight, 0)
        for forward in forwards:
            forward.release()
        in_flight.ended.settle(0.0)
        case.assertIdle()
        for endpoint in case.router.registry.endpoints(P):
            self.assertEqual((endpoint.pending_handoffs, endpoint.prefill.queued), (0, 0.0))


if __name__ == "__main__":
    unittest.main()
