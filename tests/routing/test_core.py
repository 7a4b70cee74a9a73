"""The request path with a prefill leg that is no I/O: what goes where, and that nothing stays reserved."""

import asyncio
import json
import unittest
from collections.abc import Mapping
from typing import Any

from tests.support.routing import BODY, ERROR, PARAMS, Case, D, P, answer, decode_body
from vllm_pd_scheduler.handoff.interfaces import PrefillAnswer, PrefillFailed
from vllm_pd_scheduler.models import PDInstance
from vllm_pd_scheduler.routing.attempts import FailedAttempt, Failure


class SplitTest(Case):
    async def test_prefill_then_decode(self) -> None:
        forward = await self.route(x_request_id="id-1")
        self.assertSplit(forward, "p0")
        self.assertEqual([endpoint.id for endpoint in forward.decode], ["d0", "d1", "d2"])
        headers = forward.headers()
        self.assertEqual(
            headers["x-gateway-destination-endpoint"], "10.0.0.2:8000,10.0.0.2:8001,10.0.0.2:8002"
        )
        self.assertNotIn("content-length", headers, "the client's, until the hand-off is in it")
        name, path, sent, body = self.leg.sent[0]
        self.assertEqual((name, path, sent["x-request-id"]), ("p0", "/v1/completions", "id-1"))
        self.assertEqual((body["prompt"], body["max_tokens"], body["stream"]), ("你好", 1, False))
        self.assertIs(body["kv_transfer_params"]["do_remote_decode"], True)
        self.assertEqual(self.count("pd_scheduler_requests_total", decode="d0", served="split"), 1.0)
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
        self.assertEqual(decode_body(forward, body), {**body, "kv_transfer_params": PARAMS})
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
                self.assertEqual(self.count("pd_scheduler_requests_total", decode="d0", served="whole"), 1.0)

    async def test_other_paths_and_methods_pass_as_they_are(self) -> None:
        for path, method in (
            ("/v1/models", "GET"),
            ("/v1/completions", "GET"),
            ("/v1/embeddings", "POST"),
            ("/v1/responses/resp_0123", "GET"),
            ("/tokenize", "POST"),
        ):
            with self.subTest(path, method=method):
                self.setUp()
                forward = await self.route(path=path, method=method)
                self.assertLocal(forward)
                self.assertEqual(self.leg.sent, [])
                self.assertEqual(self.count("pd_scheduler_requests_total", decode="d0", served="passed"), 1.0)

    async def test_they_have_a_time_limit_too(self) -> None:
        config, path = self.router.config, "/v1/embeddings"
        first = config.decode_first_byte_timeout
        whole = first + 32_768 * config.decode_seconds_per_token
        for body, expected, stream in (
            (b"", first, False),
            ({"input": "x"}, whole, False),
            ({"input": "x", "stream": True}, first, True),
            (b"\x00not JSON: stream"[1:], whole, False),
        ):
            with self.subTest(body):
                forward = await self.route(body, path)
                self.assertEqual((forward.first_byte_timeout, forward.stream), (expected, stream))
                forward.release()

    async def test_one_that_two_instances_have_lost_is_refused(self) -> None:
        killer, in_flight = {"input": "it kills"}, self.router.in_flight
        for _ in range(2):
            forward = await self.route(killer, "/v1/responses")
            d = forward.decode[0]
            in_flight.attempt_failed(FailedAttempt(str(d.address), Failure.RESET, forward.id))
            forward.release()
        self.assertRejected(await self.route(killer, "/v1/responses"), 503, "lost")
        (await self.route({"input": "another"}, "/v1/responses")).release()
        (await self.route(b"", "/v1/models", "GET")).release()

    async def test_a_path_that_is_not_public(self) -> None:
        for path in (
            "/metrics",
            "/v1/completions/",
            "/v1/chat%2Fcompletions",
            "/v1/chat/%63ompletions",
            "",
            "*",
        ):
            with self.subTest(path):
                self.setUp()
                outcome = await self.route(path=f"{path}?a=/v1/models")
                error = self.assertRejected(outcome, 404, "not_public")
                self.assertEqual(error["type"], "NotFoundError")
                self.assertEqual(self.leg.sent, [])

    async def test_public_paths_are_those_of_the_configuration(self) -> None:
        self.CONFIG = {"public_paths": ["/own/*"]}
        self.setUp()
        self.assertRejected(await self.route(path="/v1/models"), 404, "not_public")
        self.assertLocal(await self.route(path="/own/thing"))
        self.assertSplit(await self.route(), "p0")

    async def test_without_a_prefill_leg_decode_prefills(self) -> None:
        self.router.prefill_leg = None
        self.assertLocal(await self.route())


class ClientsHandOffTest(Case):
    """It never passes, wherever the request goes."""

    BAD: Mapping[str, Any] = {**BODY, "kv_transfer_params": {"do_remote_prefill": True}}

    async def test_split(self) -> None:
        forward = await self.route(self.BAD)
        self.assertEqual(json.loads(forward.body), BODY)
        self.assertEqual(decode_body(forward), {**BODY, "kv_transfer_params": PARAMS})

    async def test_whole(self) -> None:
        forward = await self.route({**self.BAD, "n": 2})
        self.assertEqual(json.loads(forward.body), {**BODY, "n": 2})

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
        self.assertEqual(load.bytes_per_token_by_model(), {"m": 2.0})
        self.assertEqual(forward.decode[0].tokens, 1500 + min(load.output_tokens, BODY["max_tokens"]))
        forward.release()
        for _ in range(3 * 8):  # no time at all: what takes so little is learned from eight at a time
            (await self.route(body)).release()
        self.assertGreaterEqual(sum(e.prefill.fit.samples for e in self.router.registry.endpoints(P)), 3)

    async def test_what_says_nothing_teaches_nothing(self) -> None:
        for tokens in (0, -5, None):
            self.leg.answers = dict.fromkeys(("p0", "p1", "p2"), self.read(tokens))
            (await self.route()).release()
            self.assertEqual(self.router.registry.load.bytes_per_token_by_model(), {})
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
            sum(self.count("pd_scheduler_requests_total", decode=f"d{i}", served="alone") for i in range(3)),
            6,
        )
        self.assertEqual({name: names.count(name) for name in names}, {"d0": 2, "d1": 2, "d2": 2})
        self.assertIdle()

    async def test_a_long_one_is_split(self) -> None:
        body = {**BODY, "prompt": "x" * 5000}
        forward = await self.route(body)
        self.assertEqual(decode_body(forward, body), {**body, "kv_transfer_params": PARAMS})
        forward.release()


class WaitingTest(Case):
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
        self.assertEqual(len(self.router.dispatcher.queue), 0)

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


if __name__ == "__main__":
    unittest.main()
