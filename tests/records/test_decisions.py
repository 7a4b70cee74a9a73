"""What is remembered of a request's decision, for every kind of request, and how it is shown."""

import asyncio
import json
import math
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fleet import prompt, scheduler_of
from tests.support.in_flight import InFlightCase
from tests.support.routing import BODY, answer
from vllm_pd_scheduler.handoff.interfaces import PrefillFailed
from vllm_pd_scheduler.models import PD_ROLES, InstanceRole
from vllm_pd_scheduler.records.decision import Decision
from vllm_pd_scheduler.records.decisions import MAX_DECISIONS, Decisions
from vllm_pd_scheduler.request.errors import Reject
from vllm_pd_scheduler.router import PDRouter
from vllm_pd_scheduler.routing.attempts import Failure
from vllm_pd_scheduler.routing.forward import Forward
from vllm_pd_scheduler.routing.result import Result
from vllm_pd_scheduler.scheduler import Scheduler
from vllm_pd_scheduler.strategies import Strategy
from vllm_pd_scheduler.telemetry import Ending

P, D = InstanceRole.PREFILL, InstanceRole.DECODE


class Case(InFlightCase):
    async def sent(self, path: str = "/v1/completions", method: str = "POST", **body: Any) -> Any:
        headers = {":method": method, ":path": path, "x-request-id": "r"}
        return await self.router.route(headers, json.dumps({**BODY, **body}).encode())

    def shown(self, router: PDRouter | None = None) -> dict[str, Any]:
        """The newest decision, as JSON has it."""
        decisions = (router or self.router).decisions
        found: dict[str, Any] = json.loads(json.dumps(decisions.as_json(decisions.after(0)[-1])))
        return found

    def end(self, forward: Forward, ending: Ending = Ending.OK, status: int = 200, number: int = 0) -> None:
        address = str(forward.decode[number].address)
        self.router.in_flight.told(Result(forward.id, ending, status, 1.5, 0.5, 0.25, address))

    def value(self, name: str, **labels: str) -> float:
        return self.router.telemetry.prometheus.get_sample_value(name, labels) or 0.0


class KindsTest(Case):
    async def test_split(self) -> None:
        self.router = self.start(strategy="predicted_latency")
        forward = await self.forward("r", stream=True)
        self.end(forward)
        found = self.shown()
        self.assertEqual((found["number"], found["request_id"], found["id"]), (1, "r", forward.id))
        self.assertEqual((found["served"], found["outcome"], found["status"]), ("split", "ok", 200))
        self.assertIsNone(found["not_split"])
        self.assertEqual((found["path"], found["model"], found["stream"]), ("/v1/completions", "m", True))
        self.assertEqual((found["ttft_s"], found["duration_s"]), (0.5, 1.5))
        self.assertEqual(found["prompt_tokens"], 5)  # as P has counted them
        self.assertAlmostEqual(found["predicted_ttft_s"], found["prefill"]["predicted_s"] + 0.04, delta=0.01)
        prefill, decode = found["prefill"], found["decode"]
        self.assertEqual(prefill["attempts"], [{"instance": prefill["picked"], "outcome": "ok"}])
        self.assertEqual(decode["attempts"], [{"instance": decode["picked"], "outcome": "ok"}])
        self.assertEqual(
            (prefill["by"], prefill["strategy"], prefill["of"]), ("strategy", "predicted_latency", 4)
        )
        self.assertEqual(len(prefill["candidates"]), 4)
        self.assertEqual(prefill["candidates"][0]["id"], prefill["picked"])
        self.assertEqual(set(prefill["candidates"][0]["terms"]), {"wait", "cost", "cached_tokens"})
        self.assertEqual([bool(each["terms"]) for each in prefill["candidates"]], [True, False, False, False])
        self.assertEqual([decode["picked"], *decode["then"]], [endpoint.id for endpoint in forward.decode])
        self.assertEqual(decode["left_out"], {})

    async def test_whole(self) -> None:
        await self.sent(n=2)
        found = self.shown()
        self.assertEqual((found["served"], found["prefill"], found["outcome"]), ("whole", None, None))
        self.assertEqual(found["not_split"], "connector")
        self.assertEqual((found["decode"]["by"], found["decode"]["strategy"]), ("strategy", "round_robin"))
        self.assertIsNotNone(found["predicted_ttft_s"])

    async def test_alone(self) -> None:
        self.router = self.start(disaggregation="never")
        await self.sent()
        self.assertEqual((self.shown()["served"], self.shown()["prefill"]), ("alone", None))
        self.assertEqual(self.shown()["not_split"], "disaggregation")

    async def test_local(self) -> None:
        self.leg.answers = {f"p{number}": PrefillFailed("connect") for number in range(4)}
        await self.sent()
        found = self.shown()
        self.assertEqual(found["served"], "local")
        self.assertEqual(found["not_split"], "prefill")
        self.assertEqual([each["outcome"] for each in found["prefill"]["attempts"]], ["connect"] * 4)

    async def test_passed(self) -> None:
        await self.sent("/v1/embeddings")
        found = self.shown()
        self.assertEqual((found["served"], found["model"]), ("passed", None))
        self.assertIsNone(found["predicted_ttft_s"])

    async def test_rejected(self) -> None:
        for endpoint in self.router.registry.endpoints(D):
            for _ in range(2):
                self.router.registry.probed(endpoint, "down")
        self.now += 1
        self.assertIsInstance(await self.sent(), Reject)
        found = self.shown()
        self.assertEqual((found["served"], found["status"], found["reason"]), ("rejected", 503, "no_decode"))
        self.assertEqual((found["outcome"], found["decode"]), ("rejected", None))

    async def test_a_queue_that_is_full(self) -> None:
        self.router = self.start(max_waiting=1, queue_size=1, queue_timeout=5)
        for endpoint in self.router.registry.endpoints(P):
            self.router.registry.work.reserve(endpoint)
        waits = asyncio.ensure_future(self.sent())
        await asyncio.sleep(0)
        self.assertIsInstance(await self.sent(), Reject)
        self.assertEqual((self.shown()["reason"], self.shown()["waited_s"]), ("queue_full", 0.0))
        self.now += 2
        waits.cancel()
        with self.assertRaises(asyncio.CancelledError):
            await waits
        found = self.shown()
        self.assertEqual((found["served"], found["outcome"], found["waited_s"]), (None, "left", 2.0))

    async def test_a_body_without_room(self) -> None:
        self.router.no_memory(10**12, {"x-request-id": "large", ":path": "/v1/completions?x"})
        found = self.shown()
        self.assertEqual((found["request_id"], found["reason"]), ("large", "too_large"))
        self.assertEqual(found["path"], "/v1/completions")

    async def test_a_client_that_leaves_during_its_prefill(self) -> None:
        self.leg.hold = asyncio.Event()
        task = asyncio.ensure_future(self.sent())
        await self.leg.entered.wait()
        task.cancel()
        with self.assertRaises(asyncio.CancelledError):
            await task
        found = self.shown()
        self.assertEqual((found["served"], found["outcome"]), (None, "left"))
        self.assertEqual(found["prefill"]["attempts"], [{"instance": "p0", "outcome": None}])

    async def test_a_client_that_left_before_envoy_had_the_answer(self) -> None:
        self.router.in_flight.unused(await self.forward())
        self.assertEqual((self.shown()["served"], self.shown()["outcome"]), ("split", "left"))

    async def test_a_request_that_could_not_be_routed(self) -> None:
        """It is a bug, and Envoy lets the request pass to D."""
        broken = mock.patch.object(Scheduler, "pick", side_effect=RuntimeError)
        with broken, self.assertRaises(RuntimeError):
            await self.sent()
        self.assertEqual((self.shown()["served"], self.shown()["outcome"]), (None, None))

    async def test_retried_at_prefill(self) -> None:
        self.leg.answers = {"p0": answer(503), "p2": PrefillFailed("reset")}
        await self.sent()
        found = self.shown()["prefill"]
        self.assertEqual([each["outcome"] for each in found["attempts"]], ["status_503", "reset", "ok"])
        self.assertEqual(found["picked"], found["attempts"][-1]["instance"])
        self.assertEqual(found["left_out"], {"tried": ["p0", "p2"]})

    async def test_retried_at_decode(self) -> None:
        forward = await self.forward(stream=True)
        self.told(forward, Failure.CONNECT)
        self.end(forward, number=1)
        names = [endpoint.id for endpoint in forward.decode]
        self.assertEqual(
            self.shown()["decode"]["attempts"],
            [{"instance": names[0], "outcome": "connect"}, {"instance": names[1], "outcome": "ok"}],
        )
        self.assertEqual(
            self.value("pd_scheduler_handoff_duration_seconds_count", prefill="p0", decode=names[1]), 0
        )

    async def test_how_its_answer_ended(self) -> None:
        for failure, ending, status, last in (
            (Failure.REFUSED, Ending.CLIENT_ERROR, 400, "refused"),
            (Failure.CUT, Ending.CUT, 200, "cut"),
            (None, Ending.LEFT, 200, "left"),
        ):
            forward = await self.forward()
            if failure is not None:
                self.told(forward, failure)
            self.end(forward, ending, status)
            self.assertEqual(self.shown()["outcome"], ending)
            self.assertEqual([each["outcome"] for each in self.shown()["decode"]["attempts"]], [last])


class LeftOutTest(Case):
    async def test_by_state_model_trial_and_load(self) -> None:
        self.router = self.start(max_waiting=3)
        registry = self.router.registry
        down, draining, other, full = registry.endpoints(P)
        for _ in range(2):
            registry.probed(down, "down")
        registry.drain(draining.id)
        for endpoint in (full, registry.endpoints(P)[2]):
            registry.models.listed(endpoint, frozenset({"m"}))
        registry.models.listed(other, frozenset({"another"}))
        await self.sent()
        found = self.shown()["prefill"]
        self.assertEqual(found["picked"], full.id)
        self.assertEqual(
            found["left_out"],
            {"unhealthy": [down.id], "draining": [draining.id], "other model": [other.id]},
        )

    async def test_full(self) -> None:
        self.router = self.start(max_in_flight_tokens=1)
        registry = self.router.registry
        first = registry.endpoints(P)[0]
        registry.ends.overloaded(first, self.now)
        await self.sent()
        self.assertEqual(self.shown()["prefill"]["left_out"], {"full": [first.id]})

    async def test_what_it_was_is_told_when_that_has_changed(self) -> None:
        registry = self.router.registry
        registry.drain("p1")
        await self.sent()
        registry.undrain("p1")
        registry.remove("p2")
        found = self.shown()["prefill"]
        self.assertEqual(found["left_out"], {"draining": ["p1"]})
        self.assertEqual({each["id"] for each in found["candidates"]}, {"p0", "p2", "p3"})


class ResultsTest(Case):
    async def test_what_is_counted(self) -> None:
        forward = await self.forward(stream=True)
        self.end(forward)
        self.end(forward)  # counts once
        prefill, decode = forward.prefill, forward.decode[0]
        assert prefill is not None
        pair = {"prefill": prefill.id, "decode": decode.id}
        self.assertEqual(self.value("pd_scheduler_responses_total", outcome="ok"), 1)
        self.assertEqual(self.value("pd_scheduler_time_to_first_token_seconds_sum", served="split"), 0.5)
        self.assertEqual(self.value("pd_scheduler_request_duration_seconds_sum", served="split"), 1.5)
        self.assertEqual(self.value("pd_scheduler_handoff_duration_seconds_sum", **pair), 0.25)
        self.assertEqual(self.value("pd_scheduler_prompt_tokens_total"), 5)
        self.assertGreaterEqual(self.value("pd_scheduler_pick_duration_seconds_count", role="decode"), 1)

    async def test_after_its_end_and_of_nobody(self) -> None:
        forward = await self.forward()
        forward.release()
        self.wait(1.0)
        self.end(forward)
        self.assertEqual(self.shown()["outcome"], "ok")
        self.router.in_flight.told(Result("of-another", Ending.OK, 200, 1.0, None, None, ""))
        self.assertEqual(self.value("pd_scheduler_responses_total", outcome="ok"), 1)

    async def test_the_first_byte_of_a_whole_answer_is_no_token(self) -> None:
        forward = await self.forward()
        self.end(forward)
        self.assertEqual((self.shown()["ttft_s"], self.shown()["duration_s"]), (None, 1.5))
        self.assertEqual(self.value("pd_scheduler_time_to_first_token_seconds_count", served="split"), 0)
        self.assertEqual(self.value("pd_scheduler_request_duration_seconds_count", served="split"), 1)
        pair = {"prefill": forward.prefill.id, "decode": forward.decode[0].id} if forward.prefill else {}
        self.assertEqual(self.value("pd_scheduler_handoff_duration_seconds_count", **pair), 0)

    async def test_an_errors_first_byte_is_no_token(self) -> None:
        forward = await self.forward(stream=True)
        self.end(forward, Ending.ERROR, 500)
        self.assertEqual(self.value("pd_scheduler_time_to_first_token_seconds_count", served="split"), 0)
        self.assertEqual(self.value("pd_scheduler_responses_total", outcome="error"), 1)


class HeaderTest(Case):
    async def asked(self, router: PDRouter, body: bytes = b"", value: str = "1") -> Any:
        headers = {":method": "POST", ":path": "/v1/completions", "x-pd-explain": value}
        return await router.route(headers, body or json.dumps(BODY).encode())

    async def test_it_is_set_if_asked_for(self) -> None:
        forward = await self.asked(self.router)
        self.assertEqual(
            forward.headers()["x-pd-decision"].rpartition(", predicted_ttft=")[0],
            "served=split, prefill=p0 of 4, decode=d0 of 4",
        )
        for outcome in (await self.asked(self.router, value="0"), await self.forward()):
            self.assertNotIn("x-pd-decision", outcome.headers())

    async def test_on_a_refusal(self) -> None:
        outcome = await self.asked(self.router, b"[]")
        self.assertEqual(outcome.headers["x-pd-decision"], "served=rejected, reason=bad_body")
        self.assertEqual(outcome.headers["x-pd-reason"], "bad_body")

    async def test_the_configuration_can_forbid_it(self) -> None:
        router = self.start(explain_header=False)
        self.assertNotIn("x-pd-decision", (await self.asked(router)).headers())


class RingTest(Case):
    async def test_the_oldest_are_forgotten(self) -> None:
        decisions = Decisions(lambda: 0.0, lambda: 0.0)
        for number in range(MAX_DECISIONS + 5):
            decisions.add(Decision(0.0, f"r{number}"))
        self.assertEqual(len(decisions.after(0)), MAX_DECISIONS)
        self.assertEqual([each.number for each in decisions.after(MAX_DECISIONS + 3)], [1004, 1005])
        self.assertEqual(len(decisions.after(5000)), MAX_DECISIONS)  # of before a restart

    async def test_what_clients_choose_is_cut(self) -> None:
        await self.sent("/" + "x" * 5000)
        self.assertEqual(len(self.shown()["path"]), 256)
        await self.sent(model="m" * 500)
        self.assertEqual(len(self.shown()["model"]), 256)


numbers = st.one_of(st.floats(allow_nan=False), st.integers(-(10**400), 10**400), st.booleans())


@given(
    scores=st.one_of(
        st.lists(numbers, min_size=3, max_size=3),
        st.lists(st.tuples(numbers, numbers), min_size=3, max_size=3),
        st.lists(st.text(max_size=2), min_size=3, max_size=3),
        st.lists(st.tuples(st.text(max_size=2), numbers), min_size=3, max_size=3),
        st.lists(st.tuples(numbers), min_size=3, max_size=3),
    ),
    terms=st.dictionaries(
        st.text(max_size=3), st.one_of(numbers, st.none(), st.text(max_size=2)), max_size=20
    ),
    count=st.integers(1, 3),
)
def test_whatever_a_strategy_compares_is_shown_as_json(scores: list[Any], terms: Any, count: int) -> None:
    class Odd(Strategy):
        def scores(self, endpoints: Any, request: Any) -> Any:
            return scores

        def terms(self, endpoint: Any, request: Any) -> Any:
            return terms

    scheduler = scheduler_of(3, 3)
    scheduler.strategies.install(Odd, D, "odd")
    request = prompt()
    picked = scheduler.pick(D, request, count=count)
    choice = scheduler.explain(D, request)
    assert choice is not None
    assert choice.picked is picked[0]
    decision = Decision(decode=choice, decode_to=picked)
    shown = Decisions(lambda: 0.0, lambda: 0.0).as_json(decision)
    json.dumps(shown, allow_nan=False)
    assert len(shown["decode"]["candidates"]) == 3


def test_of_a_large_fleet_only_the_best_are_kept() -> None:
    for name, number, kept in (("least_load", 32, 32), ("round_robin", 300, 1)):
        scheduler = scheduler_of(300, 300, strategy=name)
        request = prompt()
        scheduler.pick(D, request, count=4)
        choice = scheduler.explain(D, request)
        assert choice is not None
        assert choice.number <= number
        assert len(choice.offered) <= kept
        shown = Decisions(lambda: 0.0, lambda: 0.0).as_json(
            Decision(decode=choice, decode_to=[choice.picked])
        )
        assert len(shown["decode"]["left_out"]["not drawn"]) == 32
        assert not math.isnan(shown["decode"]["of"])


@pytest.mark.parametrize(
    "name", ["round_robin", "least_load", "weighted", "power_of_two", "session", "prefix_cache", "slo"]
)
def test_each_strategy_explains(name: str) -> None:
    scheduler = scheduler_of(4, 4, strategy=name)
    for role in PD_ROLES:
        request = prompt(session="s")
        picked = scheduler.pick(role, request)
        choice = scheduler.explain(role, request)
        assert choice is not None
        assert choice.picked is picked[0]
        assert not +scheduler.strategies.failures.counts
        assert bool(choice.terms) is (name != "round_robin")
