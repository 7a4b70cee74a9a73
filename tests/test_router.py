"""The request path with a prefill leg that is no I/O: what goes where, and that nothing stays reserved."""

import asyncio
import json
import unittest
from collections.abc import Mapping
from typing import Any
from unittest import mock

from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.errors import Reject
from vllm_pd_scheduler.legs import PrefillAnswer, PrefillFailed
from vllm_pd_scheduler.models import InstanceRole, PDInstance
from vllm_pd_scheduler.registry import DuplicateInstance, Endpoint, UnknownInstance
from vllm_pd_scheduler.router import PDRouter

P, D = InstanceRole.PREFILL, InstanceRole.DECODE
PARAMS = {
    "do_remote_prefill": True,
    "remote_block_ids": [[1, 2]],
    "remote_engine_id": "e",
    "remote_request_id": "r",
    "remote_host": "10.0.0.1",
    "remote_port": 5600,
}
BODY: dict[str, Any] = {"model": "m", "prompt": "你好", "max_tokens": 100}
ERROR = b'{"error":{"message":"as the instance wrote it"}}'


def answer(status: int = 200, body: bytes | None = None, params: Any = PARAMS) -> PrefillAnswer:
    content = body or json.dumps({"usage": {"prompt_tokens": 5}, "kv_transfer_params": params}).encode()
    return PrefillAnswer(status, "application/json", content)


class Leg:
    """A prefill leg that answers as it is told, instance by instance, and notes what it was sent."""

    def __init__(self) -> None:
        self.answers: dict[str, PrefillAnswer | Exception] = {}
        self.sent: list[tuple[str, str, dict[str, str], Any]] = []
        self.in_flight: list[int] = []
        self.hold: asyncio.Event | None = None
        self.entered = asyncio.Event()

    async def __call__(
        self, endpoint: Endpoint, path: str, headers: Mapping[str, str], body: bytes
    ) -> PrefillAnswer:
        self.sent.append((endpoint.id, path, dict(headers), json.loads(body)))
        self.in_flight.append(endpoint.in_flight)
        self.entered.set()
        if self.hold is not None:
            await self.hold.wait()
        found = self.answers.get(endpoint.id, answer())
        if isinstance(found, Exception):
            raise found
        return found

    @property
    def tried(self) -> list[str]:
        return [name for name, *_ in self.sent]


class Case(unittest.IsolatedAsyncioTestCase):
    CONFIG: Mapping[str, Any] = {}
    KEYS: Mapping[str, str] = {}

    def setUp(self) -> None:
        self.leg = Leg()
        config = SchedulerConfig(**{"strategy": "round_robin", **self.CONFIG})
        self.router = PDRouter(config, prefill_leg=self.leg)
        for role, name, host in ((P, "p", "10.0.0.1"), (D, "d", "10.0.0.2")):
            for number in range(3):
                one = f"{name}{number}"
                self.router.register_instance(PDInstance(one, role, host, 8000 + number, self.KEYS.get(one)))
        for endpoint in self.router.registry:
            self.router.registry.probed(endpoint, None)

    def down(self, *names: str) -> None:
        for name in names:
            for _ in range(2):
                self.router.registry.probed(self.router.registry.get(name), "down")

    def fail_all(self, found: PrefillAnswer | Exception) -> None:
        self.leg.answers = dict.fromkeys(("p0", "p1", "p2"), found)

    async def route(
        self, body: Any = BODY, path: str = "/v1/completions", method: str = "POST", **headers: str
    ) -> Any:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.router.route({":method": method, ":path": path, **more}, raw)

    def count(self, name: str, **labels: str) -> float:
        return self.router.telemetry.prometheus.get_sample_value(name, labels) or 0.0

    def assertIdle(self) -> None:
        busy = {endpoint.id: endpoint.in_flight for endpoint in self.router.registry if endpoint.in_flight}
        self.assertEqual(busy, {})

    def assertSplit(self, forward: Any, prefill: str) -> None:
        self.assertNotIsInstance(forward, Reject)
        self.assertEqual(forward.prefill.id, prefill)
        self.assertEqual(json.loads(forward.body), {**BODY, "kv_transfer_params": PARAMS})
        self.assertEqual(forward.headers()["x-pd-prefill"], prefill)

    def assertLocal(self, forward: Any) -> None:
        """On D alone, with the client's own bytes."""
        self.assertNotIsInstance(forward, Reject)
        self.assertIsNone(forward.prefill)
        self.assertIsNone(forward.body)
        self.assertNotIn("x-pd-prefill", forward.headers())

    def assertRejected(self, outcome: Any, status: int, reason: str) -> dict[str, Any]:
        self.assertIsInstance(outcome, Reject)
        self.assertEqual((outcome.status, outcome.reason), (status, reason))
        self.assertEqual(outcome.headers["content-type"], "application/json")
        self.assertEqual(self.count("pd_requests_rejected_total", status=str(status), reason=reason), 1.0)
        self.assertIdle()
        error: dict[str, Any] = json.loads(outcome.body)["error"]
        return error


class SplitTest(Case):
    async def test_prefill_then_decode(self) -> None:
        forward = await self.route(x_request_id="id-1")
        self.assertSplit(forward, "p0")
        self.assertEqual([endpoint.id for endpoint in forward.decode], ["d0", "d1", "d2"])
        headers = forward.headers()
        self.assertEqual(
            headers["x-gateway-destination-endpoint"], "10.0.0.2:8000,10.0.0.2:8001,10.0.0.2:8002"
        )
        self.assertEqual(headers["content-length"], str(len(forward.body)))
        name, path, sent, body = self.leg.sent[0]
        self.assertEqual((name, path, sent["x-request-id"]), ("p0", "/v1/completions", "id-1"))
        self.assertEqual((body["prompt"], body["max_tokens"], body["stream"]), ("你好", 1, False))
        self.assertIs(body["kv_transfer_params"]["do_remote_decode"], True)
        self.assertEqual(self.count("pd_requests_total", decode="d0", served="split"), 1.0)
        forward.release()

    async def test_reservations_from_pick_to_release(self) -> None:
        forward = await self.route()
        self.assertEqual(self.leg.in_flight, [1], "P is reserved while it prefills")
        self.assertEqual({e.id: e.in_flight for e in self.router.registry if e.in_flight}, {"d0": 1})
        for _ in range(2):
            forward.release()
            self.assertIdle()

    async def test_chat(self) -> None:
        body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
        forward = await self.route(body, "/v1/chat/completions?a=b")
        self.assertEqual(json.loads(forward.body), {**body, "kv_transfer_params": PARAMS})
        self.assertEqual(self.leg.sent[0][1], "/v1/chat/completions")

    async def test_steering_headers_of_a_client_are_removed(self) -> None:
        forward = await self.route(
            **{
                "x-pd-prefill": "p9",
                "x-pd-anything": "1",
                "x-gateway-destination-endpoint-hint": "1",
                "x-a": "2",
            }
        )
        self.assertEqual(
            sorted(forward.remove_headers),
            ["x-gateway-destination-endpoint-hint", "x-pd-anything", "x-pd-prefill"],
        )


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
        ]
        for failure, reason in cases:
            with self.subTest(reason):
                self.setUp()
                self.leg.answers = {"p0": failure}
                forward = await self.route()
                self.assertEqual(len(self.leg.tried), 2)
                self.assertNotEqual(self.leg.tried[1], "p0")
                self.assertSplit(forward, self.leg.tried[1])
                self.assertEqual(self.count("pd_prefill_failures_total", prefill="p0", reason=reason), 1.0)
                forward.release()
                self.assertIdle()

    async def test_max_retries_then_decode_prefills(self) -> None:
        self.fail_all(answer(500, ERROR))
        forward = await self.route()
        self.assertLocal(forward)
        self.assertEqual(len(set(self.leg.tried)), 2)
        self.assertEqual(self.count("pd_requests_total", decode="d0", served="local"), 1.0)
        forward.release()
        self.assertIdle()

    async def test_what_every_p_would_refuse_goes_to_the_client_as_it_is(self) -> None:
        for status in (400, 401, 403, 404, 413, 422):
            with self.subTest(status):
                self.setUp()
                self.leg.answers = {"p0": answer(status, ERROR)}
                outcome = await self.route()
                self.assertRejected(outcome, status, "prefill_4xx")
                self.assertEqual(outcome.body, ERROR)
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
                self.assertEqual(self.count("pd_prefill_failures_total", prefill="p0", reason=reason), 1.0)
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
                self.assertLocal(forward)
                self.assertEqual(self.leg.tried, ["p0"], "another P is configured the same")
                reason = "no_handoff"
                self.assertEqual(self.count("pd_prefill_failures_total", prefill="p0", reason=reason), 1.0)
                forward.release()
                self.assertIdle()

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


class NobodyTest(Case):
    async def test_without_a_healthy_p_decode_prefills(self) -> None:
        self.down("p0", "p1")
        self.router.drain_instance("p2")
        forward = await self.route()
        self.assertLocal(forward)
        self.assertEqual(self.leg.sent, [])

    async def test_without_a_healthy_d_no_p_is_troubled(self) -> None:
        self.down("d0", "d1")
        self.router.drain_instance("d2")
        outcome = await self.route()
        error = self.assertRejected(outcome, 503, "no_decode")
        self.assertEqual(outcome.headers["retry-after"], "1")
        self.assertEqual(
            error["message"],
            "No decode instance can serve this request now: "
            "d0 is unhealthy, d1 is unhealthy, d2 is draining.",
        )
        self.assertEqual((error["type"], error["code"]), ("ServiceUnavailableError", 503))
        self.assertEqual(self.leg.sent, [])

    async def test_other_paths_need_a_d_too(self) -> None:
        for name in ("d0", "d1", "d2"):
            self.router.unregister_instance(name)
        error = self.assertRejected(await self.route(b"", "/v1/models", "GET"), 503, "no_decode")
        self.assertIn("none is registered", error["message"])

    async def test_the_last_d_that_goes_during_the_prefill(self) -> None:
        self.leg.hold = asyncio.Event()
        task = asyncio.ensure_future(self.route())
        await self.leg.entered.wait()
        for name in ("d0", "d1", "d2"):
            self.router.unregister_instance(name)
        self.leg.hold.set()
        self.assertRejected(await task, 503, "no_decode")


class CancelTest(Case):
    async def test_a_client_that_leaves_during_the_prefill(self) -> None:
        self.leg.hold = asyncio.Event()
        task = asyncio.ensure_future(self.route())
        await self.leg.entered.wait()
        self.assertEqual(sum(e.in_flight for e in self.router.registry), 1)
        task.cancel()
        with self.assertRaises(asyncio.CancelledError):
            await task
        self.assertIdle()
        self.assertEqual(self.leg.tried, ["p0"], "nobody else is asked")

    async def test_many_at_once(self) -> None:
        self.leg.hold = asyncio.Event()
        self.leg.answers = {"p0": answer(500, ERROR), "p1": PrefillFailed("connect")}
        tasks = [asyncio.ensure_future(self.route()) for _ in range(30)]
        await self.leg.entered.wait()
        await asyncio.sleep(0)
        for task in tasks[::3]:
            task.cancel()
        self.leg.hold.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        served = [each for each in outcomes if not isinstance(each, BaseException)]
        self.assertEqual(len(served), 20)
        self.assertEqual(sum(e.in_flight for e in self.router.registry.endpoints(P)), 0)
        self.assertEqual(sum(e.in_flight for e in self.router.registry.endpoints(D)), 20)
        for forward in served:
            self.assertEqual(forward.prefill.id, "p2")
            forward.release()
        self.assertIdle()


class WholeTest(Case):
    async def test_what_cannot_be_split_goes_to_decode_alone(self) -> None:
        for more in (
            {"n": 2},
            {"prompt": ["a", "b"]},
            {"echo": True},
            {"prompt_logprobs": 1},
            {"best_of": 2},
        ):
            with self.subTest(more):
                self.setUp()
                forward = await self.route({**BODY, **more})
                self.assertLocal(forward)
                self.assertEqual(self.leg.sent, [])
                self.assertEqual(self.count("pd_requests_total", decode="d0", served="whole"), 1.0)

    async def test_other_paths_and_methods_pass_as_they_are(self) -> None:
        for path, method in (
            ("/v1/models", "GET"),
            ("/v1/completions", "GET"),
            ("/v1/embeddings", "POST"),
            ("/v1/completions/", "POST"),
            ("/tokenize", "POST"),
        ):
            with self.subTest(path, method=method):
                self.setUp()
                forward = await self.route(path=path, method=method)
                self.assertLocal(forward)
                self.assertEqual(self.leg.sent, [])
                self.assertEqual(self.count("pd_requests_total", decode="d0", served="passed"), 1.0)

    async def test_without_a_prefill_leg_decode_prefills(self) -> None:
        self.router.prefill_leg = None
        self.assertLocal(await self.route())


class ClientsHandOffTest(Case):
    """It never passes, wherever the request goes."""

    BAD: Mapping[str, Any] = {**BODY, "kv_transfer_params": {"do_remote_prefill": True}}

    async def test_split(self) -> None:
        self.assertSplit(await self.route(self.BAD), "p0")

    async def test_whole(self) -> None:
        forward = await self.route({**self.BAD, "n": 2})
        self.assertEqual(json.loads(forward.body), {**BODY, "n": 2})
        self.assertEqual(forward.headers()["content-length"], str(len(forward.body)))

    async def test_local(self) -> None:
        self.down("p0", "p1", "p2")
        forward = await self.route(self.BAD)
        self.assertEqual(json.loads(forward.body), BODY)

    async def test_on_other_paths(self) -> None:
        forward = await self.route({"a": [self.BAD]}, "/v1/responses")
        self.assertEqual(json.loads(forward.body), {"a": [BODY]})
        forward.release()
        outcome = await self.route('{"kv_transfer_params": 1}'.encode("utf-16"), "/v1/responses")
        self.assertRejected(outcome, 400, "bad_body")


class BadBodyTest(Case):
    async def test_each(self) -> None:
        for body in (b"", b"[]", b"{", b"\xff", b'{"prompt": "x"'):
            with self.subTest(body):
                self.setUp()
                error = self.assertRejected(await self.route(body), 400, "bad_body")
                self.assertEqual((error["type"], error["code"]), ("BadRequestError", 400))
                self.assertEqual(self.leg.sent, [])


class ApiKeysTest(Case):
    KEYS: Mapping[str, str] = {"d0": "sk-a", "d1": "sk-b", "d2": "sk-a"}

    async def test_decode_gets_its_key_and_a_retry_finds_the_same(self) -> None:
        first, second = await self.route(authorization="Bearer client"), await self.route()
        self.assertEqual(first.headers()["authorization"], "Bearer sk-a")
        self.assertEqual([endpoint.id for endpoint in first.decode], ["d0", "d2"])
        self.assertEqual(second.headers()["authorization"], "Bearer sk-b")
        self.assertEqual([endpoint.id for endpoint in second.decode], ["d1"])

    async def test_without_a_key_the_clients_own_passes(self) -> None:
        for name in ("d0", "d1", "d2"):
            self.router.unregister_instance(name)
        endpoint = self.router.registry.add(PDInstance("d9", D, "10.0.0.9", 80))
        self.router.registry.probed(endpoint, None)
        forward = await self.route(authorization="Bearer client")
        self.assertNotIn("authorization", forward.headers())
        self.assertNotIn("authorization", forward.remove_headers)
        self.assertEqual(self.leg.sent[0][2]["authorization"], "Bearer client")


class LearningTest(Case):
    CONFIG: Mapping[str, Any] = {"prefill_strategy": "predicted_latency"}

    async def test_the_length_of_prompts_is_learned(self) -> None:
        load = self.router.registry.load
        body = {**BODY, "prompt": "x" * 3000}
        self.leg.answers = dict.fromkeys(("p0", "p1", "p2"), self.read(1500))
        forward = await self.route(body)
        self.assertEqual(load.ratios(), {"m": 2.0})
        self.assertEqual(forward.decode[0].tokens, 1500 + min(load.output_tokens, BODY["max_tokens"]))
        forward.release()
        for _ in range(3 * 8):  # no time at all: what takes so little is learned from eight at a time
            (await self.route(body)).release()
        self.assertGreaterEqual(sum(e.prefill.fit.samples for e in self.router.registry.endpoints(P)), 3)

    async def test_what_says_nothing_teaches_nothing(self) -> None:
        for tokens in (0, -5, None):
            self.leg.answers = dict.fromkeys(("p0", "p1", "p2"), self.read(tokens))
            (await self.route()).release()
            self.assertEqual(self.router.registry.load.ratios(), {})
            self.assertEqual(sum(e.prefill.queued for e in self.router.registry), 0.0)

    def read(self, tokens: int | None) -> PrefillAnswer:
        content = {"usage": {"prompt_tokens": tokens}, "kv_transfer_params": PARAMS}
        return answer(body=json.dumps(content).encode())


class AloneTest(Case):
    CONFIG: Mapping[str, Any] = {"disaggregation": 1000, "max_retries": 1}

    async def test_a_short_prompt_stays_at_decode(self) -> None:
        names = []
        for _ in range(6):
            forward = await self.route()
            self.assertLocal(forward)
            self.assertEqual(len(forward.decode), 2)
            names.append(forward.decode[0].id)
            forward.release()
        self.assertEqual(self.leg.sent, [])
        self.assertEqual(
            sum(self.count("pd_requests_total", decode=f"d{i}", served="alone") for i in range(3)), 6
        )
        self.assertEqual({name: names.count(name) for name in names}, {"d0": 2, "d1": 2, "d2": 2})
        self.assertIdle()

    async def test_a_long_one_is_split(self) -> None:
        body = {**BODY, "prompt": "x" * 5000}
        forward = await self.route(body)
        self.assertEqual(json.loads(forward.body), {**body, "kv_transfer_params": PARAMS})
        forward.release()


class LineTest(Case):
    CONFIG: Mapping[str, Any] = {"max_in_flight_tokens": 1, "queue_size": 4, "max_held_bytes": 1 << 20}

    def setUp(self) -> None:
        super().setUp()
        for name in ("p1", "p2", "d1", "d2"):
            self.router.unregister_instance(name)

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def test_requests_wait_for_decode_and_are_served_in_turn(self) -> None:
        forward = await self.route()
        tasks = [asyncio.ensure_future(self.route()) for _ in range(3)]
        await self.settle()
        self.assertEqual(self.leg.tried, ["p0"])
        for number in range(3):
            forward.release()
            await self.settle()
            self.assertEqual([task.done() for task in tasks], [True] * (number + 1) + [False] * (2 - number))
            forward = tasks[number].result()
        forward.release()
        self.assertIdle()

    async def test_whole_requests_wait_too_and_one_place_is_for_one(self) -> None:
        whole = {**BODY, "n": 2}
        forward = await self.route(whole)
        tasks = [asyncio.ensure_future(self.route(whole)) for _ in range(3)]
        for number in range(3):
            await self.settle()
            self.assertEqual(sum(task.done() for task in tasks), number)
            self.assertEqual(forward.decode[0].in_flight, 1)
            forward.release()
            await self.settle()
            forward = tasks[number].result()
        forward.release()
        self.assertIdle()

    async def test_a_full_queue(self) -> None:
        await self.route()
        tasks = [asyncio.ensure_future(self.route()) for _ in range(4)]
        await self.settle()
        outcome = await self.route()
        self.assertEqual((outcome.status, outcome.reason), (429, "queue_full"))
        self.assertIn("retry-after", outcome.headers)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.assertEqual(len(self.router.dispatcher.line), 0)

    async def test_an_instance_that_is_added_or_leaves_ends_the_wait(self) -> None:
        forward = await self.route()
        task = asyncio.ensure_future(self.route())
        await self.settle()
        self.router.unregister_instance("d0")
        await self.settle()
        self.assertEqual(task.result().reason, "no_decode")
        forward.release()

    async def test_headers_that_are_wrong(self) -> None:
        for path in ("/v1/completions", "/v1/embeddings"):
            self.setUp()
            error = self.assertRejected(await self.route(path=path, x_pd_priority="high"), 400, "bad_header")
            self.assertIn("x-pd-priority", error["message"])


class InstancesTest(Case):
    async def test_the_library_interface(self) -> None:
        self.assertEqual([i.instance_id for i in self.router.get_instances(role=P)], ["p0", "p1", "p2"])
        self.assertEqual(len(self.router.get_instances()), 6)
        self.router.unregister_instance("p0")
        self.assertEqual([i.instance_id for i in self.router.get_instances(role=P)], ["p1", "p2"])
        for call in (self.router.unregister_instance, self.router.drain_instance):
            with self.assertRaises(UnknownInstance):
                call("p0")
        with self.assertRaises(DuplicateInstance):
            self.router.register_instance(PDInstance("p1", P, "10.0.0.7", 1))

    async def test_a_draining_p_takes_nothing_new(self) -> None:
        self.router.drain_instance("p0")
        for _ in range(4):
            (await self.route()).release()
        self.assertNotIn("p0", self.leg.tried)
        self.assertEqual(len(self.leg.tried), 4)


if __name__ == "__main__":
    unittest.main()
