"""Which spans a request has, and what stands in them."""

import asyncio
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from tests.support.encode import EncodeLeg, chat
from tests.support.routing import BODY, Case, answer
from tests.support.tracing import SAMPLED, SPAN, TRACE, UNSAMPLED, Recorder, attributes, failed, traceparent
from tests.support.waiting import until
from vllm_pd_scheduler.handoff.interfaces import PrefillFailed
from vllm_pd_scheduler.handoff.traced_leg import TracedLeg
from vllm_pd_scheduler.models import InstanceRole, PDInstance
from vllm_pd_scheduler.request.errors import Reject
from vllm_pd_scheduler.routing.attempts import FailedAttempt, Failure
from vllm_pd_scheduler.routing.ended import REMEMBERED_S
from vllm_pd_scheduler.routing.forward import Forward
from vllm_pd_scheduler.routing.result import Result
from vllm_pd_scheduler.telemetry import Ending
from vllm_pd_scheduler.tracing.attributes import text

SPLIT = ["POST /v1/completions", "decode", "pick decode", "pick prefill", "prefill"]


class TracedCase(Case):
    RATIO = 1.0

    def setUp(self) -> None:
        super().setUp()
        self.recorder = Recorder(self.RATIO)
        self.router.tracer = self.recorder.tracer
        self.router.prefill_leg = TracedLeg(self.leg, self.router.in_flight._clock)

    def end(self, forward: Forward) -> None:
        """Let an answer end, and the time go by in which Envoy may still tell of it."""
        forward.release()
        self.ahead += REMEMBERED_S + 0.1
        self.router.in_flight.ended.settle()

    def fail(self, forward: Forward, at: int, failure: Failure, status: int = 0) -> None:
        """Let Envoy tell that an attempt at the forward's D of that number has failed."""
        self.router.in_flight.attempt_failed(
            FailedAttempt(str(forward.decode[at].address), failure, forward.id, at == 0, status)
        )

    def sent_to_p(self, number: int = 0) -> dict[str, str]:
        return self.leg.sent[number][2]


class SplitTest(TracedCase):
    async def test_a_split_request_has_its_legs_and_picks(self) -> None:
        forward = await self.route(x_request_id="r-1")
        self.assertEqual(self.recorder.all("decode"), [], "its answer has not ended")
        self.end(forward)
        self.assertEqual(self.recorder.names, SPLIT)
        request = self.recorder.request
        self.assertIsNone(request.parent)
        self.assertEqual(request.name, "POST /v1/completions")
        for span in self.recorder.spans:
            self.assertFalse(failed(span), span.name)
            self.assertGreaterEqual(span.end_time, span.start_time)
            if span is not request:
                self.assertEqual(span.parent.span_id, request.context.span_id)
                self.assertGreaterEqual(span.start_time, request.start_time)
                self.assertLessEqual(span.end_time, request.end_time)

    async def test_the_request_says_what_it_was(self) -> None:
        self.end(forward := await self.route(x_request_id="r-1"))
        found = attributes(self.recorder.request)
        self.assertEqual(
            found,
            {
                "http.request.method": "POST",
                "http.route": "/v1/completions",
                "url.path": "/v1/completions",
                "http.response.status_code": 200,
                "gen_ai.operation.name": "text_completion",
                "gen_ai.request.model": "m",
                "gen_ai.usage.input_tokens": 5,
                "request_id": "r-1",
                "id": forward.id,
                "served": "split",
                "outcome": "ok",
            },
        )

    async def test_the_legs_say_where_they_went(self) -> None:
        self.end(await self.route())
        prefill, decode = attributes(self.recorder.one("prefill")), attributes(self.recorder.one("decode"))
        self.assertEqual(prefill["instance"], "p0")
        self.assertEqual(prefill["url.full"], "http://10.0.0.1:8000/v1/completions")
        self.assertEqual((prefill["server.address"], prefill["server.port"]), ("10.0.0.1", 8000))
        self.assertEqual(prefill["http.response.status_code"], 200)
        self.assertEqual(decode["instance"], "d0")
        self.assertEqual(attributes(self.recorder.one("pick prefill"))["strategy"], "round_robin")
        self.assertIn("predicted_s", attributes(self.recorder.one("pick prefill")))
        self.assertEqual(attributes(self.recorder.one("pick decode"))["instance"], "d0")

    async def test_p_and_d_continue_the_legs(self) -> None:
        forward = await self.route(traceparent=SAMPLED, tracestate="a=b", baggage="k=v")
        to_d = forward.headers()
        self.end(forward)
        request = self.recorder.request
        self.assertEqual(f"{request.context.trace_id:032x}", TRACE)
        self.assertEqual(f"{request.parent.span_id:016x}", SPAN)
        self.assertEqual(self.sent_to_p()["traceparent"], traceparent(self.recorder.one("prefill")))
        self.assertEqual(to_d["traceparent"], traceparent(self.recorder.one("decode")))
        self.assertEqual((self.sent_to_p()["tracestate"], self.sent_to_p()["baggage"]), ("a=b", "k=v"))
        self.assertFalse({"tracestate", "baggage"} & set(to_d), "Envoy has the client's own")

    async def test_nothing_private_is_told(self) -> None:
        secret = {"prompt": "private words", "user": "private person"}
        headers = {"authorization": "Bearer private-key", "baggage": "k=private", "cookie": "private"}
        self.end(await self.route({**BODY, **secret}, path="/v1/completions?key=private", **headers))
        self.assertEqual(self.recorder.names, SPLIT)
        self.assertNotIn("private", self.recorder.text)

    async def test_what_a_client_chooses_is_cut_and_can_be_encoded(self) -> None:
        self.end(await self.route({**BODY, "model": "m" * 300}, x_request_id="é" * 5000))
        found = attributes(self.recorder.request)
        self.assertEqual(found["gen_ai.request.model"], "m" * 256)
        self.assertEqual(found["request_id"], "é" * 256)
        self.assertEqual(text("a lone \ud800"), "a lone ?")

    async def test_malformed_trace_headers_begin_a_new_trace(self) -> None:
        for bad in ("", "00", f"00-{TRACE}-{SPAN}-zz", "00-" + "0" * 32 + f"-{SPAN}-01", "x" * 100_000):
            with self.subTest(bad[:60]):
                self.recorder._exporter.clear()
                self.end(await self.route(traceparent=bad, tracestate="=,=" * 1000))
                self.assertIsNone(self.recorder.request.parent)


class EncodedTest(TracedCase):
    async def test_each_item_has_a_span_that_its_instance_continues(self) -> None:
        encode = self.router.encode_leg = EncodeLeg()
        self.router.register_instance(PDInstance("e0", InstanceRole.ENCODE, "10.0.0.3", 8000))
        self.router.registry.probed(self.router.registry.get("e0"), None)
        self.end(await self.route(chat("a", "b"), "/v1/chat/completions"))
        spans = self.recorder.all("encode")
        self.assertEqual([attributes(span)["instance"] for span in spans], ["e0", "e0"])
        self.assertEqual(encode.parents, [traceparent(span) for span in spans])
        self.assertFalse(any(map(failed, spans)))

    async def test_one_that_fails_says_why(self) -> None:
        encode = self.router.encode_leg = EncodeLeg()
        encode.answers["e0"] = answer(500)
        self.router.register_instance(PDInstance("e0", InstanceRole.ENCODE, "10.0.0.3", 8000))
        self.router.registry.probed(self.router.registry.get("e0"), None)
        self.end(await self.route(chat("a"), "/v1/chat/completions"))
        (span,) = self.recorder.all("encode")
        self.assertTrue(failed(span))
        self.assertEqual(attributes(span)["error.type"], "status_500")


class RetriedTest(TracedCase):
    async def test_each_attempt_at_p_is_a_span(self) -> None:
        self.leg.answers = {"p0": PrefillFailed("connect"), "p1": answer(500), "p2": answer(500)}
        self.end(await self.route())
        first, second, third = self.recorder.all("prefill")
        self.assertTrue(failed(first) and failed(second) and failed(third))
        self.assertEqual(attributes(first)["error.type"], "connect")
        self.assertEqual(attributes(second)["error.type"], "500")
        self.assertEqual(attributes(self.recorder.request)["served"], "local")
        self.assertEqual(len(self.recorder.all("pick prefill")), 3)
        self.assertEqual(attributes(second)["http.response.status_code"], 500)
        self.assertEqual(attributes(second)["http.request.resend_count"], 1)
        sent = [headers["traceparent"] for _, _, headers, _ in self.leg.sent]
        self.assertEqual(sent, [traceparent(span) for span in self.recorder.all("prefill")])

    async def test_an_answer_without_a_hand_off_has_failed(self) -> None:
        self.leg.answers = {"p0": answer(params=None)}
        self.end(await self.route())
        first, second = self.recorder.all("prefill")
        self.assertTrue(failed(first))
        self.assertEqual(attributes(first)["error.type"], "no_handoff")
        self.assertFalse(failed(second))

    async def test_each_attempt_at_d_that_failed_is_a_span(self) -> None:
        forward = await self.route()
        to_d = forward.headers()["traceparent"]
        self.fail(forward, 0, Failure.CONNECT)
        self.fail(forward, 1, Failure.STATUS, 502)
        self.assertEqual(forward.headers()["traceparent"], to_d, "Envoy repeats it")
        self.end(forward)
        first, second = self.recorder.all("decode attempt")
        decode = self.recorder.one("decode")
        for span, instance, why in ((first, "d0", "connect"), (second, "d1", "status")):
            self.assertTrue(failed(span))
            self.assertEqual(span.parent.span_id, decode.context.span_id)
            self.assertEqual((attributes(span)["instance"], attributes(span)["error.type"]), (instance, why))
        self.assertEqual(attributes(second)["http.response.status_code"], 502)
        self.assertEqual(second.start_time, first.end_time)
        self.assertFalse(failed(decode))
        found = attributes(decode)
        self.assertEqual((found["instance"], found["http.request.resend_count"]), ("d2", 2))
        self.assertEqual(found["url.full"], "http://10.0.0.2:8002/v1/completions")
        self.assertEqual(attributes(self.recorder.request)["outcome"], "ok")

    async def test_what_is_told_after_the_end_of_the_answer_counts(self) -> None:
        forward = await self.route()
        forward.release()
        ended = self.ahead
        self.ahead += 0.1
        self.fail(forward, 0, Failure.CUT, 200)
        self.end(forward)
        request, decode = self.recorder.request, self.recorder.one("decode")
        self.assertTrue(failed(request) and failed(decode))
        self.assertEqual(attributes(request)["outcome"], "cut")
        self.assertLess(request.end_time - request.start_time, (ended + 0.1) * 1e9)

    async def test_all_d_failed(self) -> None:
        forward = await self.route()
        for number in range(len(forward.decode)):
            self.fail(forward, number, Failure.STATUS, 503)
        self.end(forward)
        request = self.recorder.request
        self.assertTrue(failed(request))
        self.assertEqual(attributes(request)["outcome"], "error")
        self.assertEqual(attributes(request)["http.response.status_code"], 503)

    async def test_a_clients_mistake_is_no_error_of_the_request(self) -> None:
        forward = await self.route()
        self.fail(forward, 0, Failure.REFUSED, 422)
        self.end(forward)
        self.assertTrue(failed(self.recorder.one("decode")))
        self.assertFalse(failed(self.recorder.request))
        self.assertEqual(attributes(self.recorder.request)["outcome"], "client_error")


class OtherWaysTest(TracedCase):
    async def test_a_request_that_is_not_split(self) -> None:
        self.end(await self.route({**BODY, "n": 2}))
        self.assertEqual(self.recorder.names, ["POST /v1/completions", "decode", "pick decode"])
        self.assertEqual(attributes(self.recorder.request)["served"], "whole")

    async def test_a_request_on_another_path(self) -> None:
        self.end(await self.route(b"", path="/v1/models", method="GET"))
        self.assertEqual(self.recorder.names, ["GET", "decode", "pick decode"])
        self.assertEqual(attributes(self.recorder.request)["url.path"], "/v1/models")
        self.assertNotIn("http.route", attributes(self.recorder.request))

    async def test_methods_have_names_of_their_own_only_if_they_are_known(self) -> None:
        self.end(await self.route(b"", path="/v1/models", method="ANYTHING"))
        self.assertEqual(self.recorder.request.name, "HTTP")
        self.assertEqual(attributes(self.recorder.request)["http.request.method"], "_OTHER")

    async def test_a_rejected_request(self) -> None:
        self.assertIsInstance(await self.route(b"no json"), Reject)
        found = attributes(self.recorder.request)
        self.assertEqual((found["http.response.status_code"], found["error.type"]), (400, "bad_body"))
        self.assertFalse(failed(self.recorder.request))
        self.assertEqual(self.recorder.names, ["POST /v1/completions"])

    async def test_a_request_that_nobody_can_serve(self) -> None:
        self.down("d0", "d1", "d2")
        await self.route()
        self.assertTrue(failed(self.recorder.request))
        self.assertEqual(attributes(self.recorder.request)["error.type"], "no_decode")

    async def test_a_client_that_leaves_during_the_prefill(self) -> None:
        self.leg.hold = asyncio.Event()
        task = asyncio.create_task(self.route())
        await self.leg.entered.wait()
        task.cancel()
        with self.assertRaises(asyncio.CancelledError):
            await task
        self.assertEqual(self.recorder.names, ["POST /v1/completions", "pick prefill", "prefill"])
        self.assertEqual(attributes(self.recorder.request)["outcome"], "left")
        self.assertFalse(failed(self.recorder.request))
        self.assertEqual(attributes(self.recorder.one("prefill"))["error.type"], "cancelled")

    async def test_a_client_that_leaves_during_the_answer(self) -> None:
        forward = await self.route()
        self.fail(forward, 0, Failure.LEFT)
        self.end(forward)
        self.assertEqual(attributes(self.recorder.request)["outcome"], "left")
        self.assertFalse(failed(self.recorder.request))
        self.assertFalse(failed(self.recorder.one("decode")))
        self.assertEqual(self.recorder.all("decode attempt"), [])

    async def test_a_client_that_leaves_before_envoy_has_the_answer(self) -> None:
        forward = await self.route()
        self.router.in_flight.unused(forward)
        self.end(forward)
        self.assertEqual(attributes(self.recorder.request)["outcome"], "left")

    async def test_a_bug(self) -> None:
        def broken(*_: Any, **__: Any) -> Any:
            raise RuntimeError("private words")

        self.router.scheduler.pick = broken  # type: ignore[method-assign]
        with self.assertRaises(RuntimeError):
            await self.route()
        self.assertEqual(attributes(self.recorder.request)["error.type"], "RuntimeError")
        self.assertNotIn("private", self.recorder.text)

    async def test_the_end_of_the_process_ends_all_spans(self) -> None:
        await self.route()
        ended = await self.route()
        ended.release()
        self.router.in_flight.close_traces()
        self.assertEqual(self.recorder.names, sorted(2 * SPLIT))
        self.end(ended)
        self.assertEqual(len(self.recorder.spans), 2 * len(SPLIT), "once")

    async def test_what_envoy_tells_of_the_end(self) -> None:
        forward = await self.route({**BODY, "stream": True})
        forward.release()
        self.router.in_flight.told(
            Result(forward.id, Ending.OK, 201, 1.0, 0.25, 0.2, str(forward.decode[0].address))
        )
        self.end(forward)
        for span in (self.recorder.request, self.recorder.one("decode")):
            found = attributes(span)
            self.assertEqual(found["gen_ai.latency.time_to_first_token"], 0.25)
            self.assertEqual(found["http.response.status_code"], 201)
        (event,) = self.recorder.request.events
        self.assertEqual(event.name, "first token")
        self.assertAlmostEqual(event.timestamp - self.recorder.request.start_time, 0.25e9, delta=1000)

    async def test_an_answer_that_was_cut_as_envoy_tells(self) -> None:
        forward = await self.route()
        self.router.in_flight.told(Result(forward.id, Ending.CUT, 200, 1.0, 0.25, 0.2, ""))
        self.end(forward)
        for span in (self.recorder.request, self.recorder.one("decode")):
            self.assertTrue(failed(span))
            self.assertEqual(attributes(span)["error.type"], "cut")


class QueueTest(TracedCase):
    CONFIG: Mapping[str, Any] = {"max_waiting": 1, "health_check_interval": 3600.0}

    async def test_a_wait_is_a_span_before_the_pick(self) -> None:
        holding = [
            self.router.registry.work.reserve(endpoint) for endpoint in self.router.registry.endpoints() * 2
        ]
        task = asyncio.create_task(self.route())
        await until(lambda: len(self.router.dispatcher.queue) == 1)
        self.ahead += 1.0
        for reservation in holding:
            reservation.release()
        self.router.registry.on_scraped()
        self.end(await task)
        self.assertEqual(self.recorder.names, sorted([*SPLIT, "queue"]))
        queue, pick = self.recorder.one("queue"), self.recorder.one("pick prefill")
        self.assertEqual(attributes(queue), {"role": "prefill", "outcome": "served"})
        self.assertGreaterEqual(queue.end_time - queue.start_time, 1e9)
        self.assertGreaterEqual(pick.start_time, queue.end_time)


class UnsampledTest(TracedCase):
    """What is not sampled is not recorded, and P and D learn that."""

    RATIO = 0.0

    async def test_an_unsampled_trace_goes_on_as_the_client_sent_it(self) -> None:
        forward = await self.route(traceparent=UNSAMPLED, tracestate="a=b")
        self.assertNotIn("traceparent", forward.headers())
        self.assertEqual(self.sent_to_p()["traceparent"], UNSAMPLED)
        self.end(forward)
        self.assertEqual(self.recorder.spans, [])

    async def test_a_sampled_trace_is_recorded_whatever_the_ratio(self) -> None:
        self.end(await self.route(traceparent=SAMPLED))
        self.assertEqual(self.recorder.names, SPLIT)

    async def test_instances_do_not_sample_what_was_not(self) -> None:
        self.leg.answers = {"p0": PrefillFailed("reset")}
        forward = await self.route()
        found = {self.sent_to_p(0)["traceparent"], self.sent_to_p(1)["traceparent"]}
        self.assertEqual(found, {forward.headers()["traceparent"]})
        (parent,) = found
        self.assertFalse(int(parent[-2:], 16) & 1, "sampled")
        self.fail(forward, 0, Failure.CONNECT)
        self.end(forward)
        self.assertEqual(self.recorder.spans, [])


class OffTest(Case):
    def test_nothing_of_opentelemetry_is_imported(self) -> None:
        code = "import sys, vllm_pd_scheduler.service.app; print([m for m in sys.modules if 'opentele' in m])"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        self.assertEqual(found.stdout.strip(), "[]")

    async def test_without_tracing_the_clients_headers_go_on_as_they_are(self) -> None:
        forward = await self.route(traceparent=SAMPLED, tracestate="a=b", baggage="k=v")
        headers = self.leg.sent[0][2]
        self.assertEqual(headers["traceparent"], SAMPLED)
        self.assertNotIn("traceparent", forward.headers())
        self.assertIsNone(forward.trace)
