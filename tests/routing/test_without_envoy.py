"""The library interface against a simulated fleet, without Envoy."""

import errno
import http.server
import json
import tempfile
import threading
import unittest
import urllib.request
from pathlib import Path
from typing import Any
from unittest import mock

from tests.support.sim_fleet import Fleet
from vllm_pd_scheduler.config import SchedulerConfig, load_config
from vllm_pd_scheduler.models import InstanceRole, InstanceState, PDInstance
from vllm_pd_scheduler.router import PDRouter
from vllm_pd_scheduler.sim.profile import EngineProfile

TEXT = {"prompt": "你好", "max_tokens": 100}


def _call(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


class FleetCase(unittest.TestCase):
    fleet: Fleet

    @classmethod
    def setUpClass(cls) -> None:
        cls.fleet = cls.enterClassContext(Fleet(2, 2, profile=EngineProfile.instant()))

    def router(self, **more: Any) -> PDRouter:
        path = Path(self.enterContext(tempfile.TemporaryDirectory())) / "scheduler_config.json"
        path.write_text(json.dumps({**self.fleet.config(), "strategy": "round_robin", **more}))
        return PDRouter(load_config(path))

    def assertIdle(self, router: PDRouter) -> None:
        self.assertEqual([e.in_flight for e in router.registry], [0] * len(list(router.registry)))


class LibraryTest(FleetCase):
    def test_as_the_documentation_has_it(self) -> None:
        router = self.router()
        result = router.route_request({"prompt": "你好", "max_tokens": 100})
        self.assertTrue(result.success, result.error)
        assert result.instance
        assert result.prefill_instance
        assert result.response
        self.assertEqual(result.instance.instance_id, "decode-0")
        self.assertEqual(result.prefill_instance.instance_id, "prefill-0")
        self.assertEqual((result.status, result.error), (200, None))
        self.assertIn(result.response["usage"]["completion_tokens"], range(1, 101))
        self.assertTrue(result.response["choices"][0]["text"])
        self.assertIdle(router)

    def test_split_or_not_the_text_is_the_same(self) -> None:
        body = {**TEXT, "temperature": 0, "prompt": "Prefill and decode. " * 40}
        split, whole = self.router(), PDRouter(SchedulerConfig())
        for instance in split.get_instances(role=InstanceRole.DECODE):
            whole.register_instance(instance)
        results = [router.route_request(body) for router in (split, whole)]
        self.assertEqual([bool(each.prefill_instance) for each in results], [True, False])
        texts = [each.response and each.response["choices"][0]["text"] for each in results]
        self.assertTrue(texts[0])
        self.assertEqual(texts[0], texts[1])

    def test_chat(self) -> None:
        body = {"messages": [{"role": "user", "content": "你好"}], "max_tokens": 5}
        result = self.router().route_request(body)
        self.assertTrue(result.success, result.error)
        assert result.response
        self.assertEqual(result.response["object"], "chat.completion")

    def test_instances_by_hand(self) -> None:
        router = PDRouter(SchedulerConfig(strategy="round_robin"))
        nobody = router.route_request(TEXT)
        self.assertEqual((nobody.success, nobody.status, nobody.instance), (False, 503, None))
        for role, each in (
            (InstanceRole.PREFILL, self.fleet["prefill-1"]),
            (InstanceRole.DECODE, self.fleet["decode-0"]),
            (InstanceRole.DECODE, self.fleet["decode-1"]),
        ):
            router.register_instance(
                PDInstance(instance_id=each.id, role=role, host=each.host, port=each.port)
            )
        self.assertEqual(router.run_health_checks(), {"prefill-1": True, "decode-0": True, "decode-1": True})
        router.drain_instance("decode-0")
        router.unregister_instance("prefill-1")
        for _ in range(2):
            result = router.route_request(TEXT)
            assert result.instance
            self.assertEqual((result.instance.instance_id, result.prefill_instance), ("decode-1", None))
        self.assertEqual(router.run_health_checks(), {"decode-0": False, "decode-1": True})

    def test_health_checks_fill_in_what_the_strategies_read(self) -> None:
        router = self.router()
        self.assertEqual(set(router.run_health_checks().values()), {True})
        self.assertTrue(all(endpoint.metrics is not None for endpoint in router.registry))


class RefusalsTest(FleetCase):
    def test_what_vllm_refuses_is_its_own_answer(self) -> None:
        result = self.router().route_request({**TEXT, "model": "no-such-model"})
        self.assertEqual((result.success, result.status), (False, 404))
        self.assertIn("no-such-model", str(result.error))

    def test_a_stream_is_not_for_this_method(self) -> None:
        result = self.router().route_request({**TEXT, "stream": True})
        self.assertEqual((result.success, result.status), (False, 400))
        self.assertIn("stream", str(result.error))

    def test_what_is_no_json(self) -> None:
        endless: dict[str, Any] = {"prompt": "x"}
        endless["self"] = endless
        for body in ({"prompt": object()}, {"prompt": "\ud800"}, endless):
            result = self.router().route_request(body)
            self.assertEqual((result.success, result.status), (False, 400))
            self.assertIn("cannot be written as JSON", str(result.error))

    def test_a_clients_hand_off_does_not_pass(self) -> None:
        result = self.router().route_request({**TEXT, "kv_transfer_params": {"do_remote_prefill": True}})
        self.assertTrue(result.success, result.error)
        self.assertTrue(all(instance.alive for instance in self.fleet.instances))


class FailuresTest(unittest.TestCase):
    """Instances that fail or die; a fleet of their own."""

    def test_a_decode_that_fails_is_replaced_and_ejected_and_its_hand_off_freed(self) -> None:
        for fault in ({"status": 500}, {"reset": True}, "killed"):
            with self.subTest(fault=fault), Fleet(1, 2, profile=EngineProfile.instant()) as fleet:
                settings = {**fleet.config(), "strategy": "round_robin", "ejection_failures": 1}
                router = PDRouter(SchedulerConfig.model_validate(settings))
                self.assertTrue(router.route_request(TEXT).success)
                if isinstance(fault, dict):
                    _call(fleet["decode-1"].url + "/_sim/fault", fault)
                else:
                    fleet.kill("decode-1")
                results = [router.route_request(TEXT) for _ in range(3)]
                self.assertEqual([each.error for each in results], [None] * 3)
                self.assertEqual(
                    {each.instance and each.instance.instance_id for each in results}, {"decode-0"}
                )
                self.assertTrue(all(each.prefill_instance for each in results))
                states = {e.id: e.state for e in router.registry.endpoints(InstanceRole.DECODE)}
                self.assertEqual(
                    states, {"decode-0": InstanceState.HEALTHY, "decode-1": InstanceState.UNHEALTHY}
                )
                self.assertEqual(_call(fleet["prefill-0"].url + "/_sim/stats")["pinned"], 0)

    def test_what_is_dead_is_not_asked_and_what_dies_is_replaced(self) -> None:
        with Fleet(1, 2, profile=EngineProfile.instant()) as fleet:
            router = PDRouter(SchedulerConfig.model_validate({**fleet.config(), "strategy": "round_robin"}))
            self.assertTrue(router.route_request(TEXT).success)
            fleet.kill("decode-1")  # the router does not know of it yet, and it is its turn
            result = router.route_request(TEXT)
            self.assertTrue(result.success, result.error)
            assert result.instance
            self.assertEqual(result.instance.instance_id, "decode-0")
            fleet.kill("prefill-0")
            result = router.route_request(TEXT)
            self.assertTrue(result.success, result.error)
            self.assertIsNone(result.prefill_instance)
            fleet.kill("decode-0")
            result = router.route_request(TEXT)
            self.assertFalse(result.success)
            self.assertTrue(result.error)
            self.assertEqual(sum(endpoint.in_flight for endpoint in router.registry), 0)
            router.run_health_checks()
            self.assertEqual(set(router.run_health_checks().values()), {False}, "unhealthy_threshold is 2")

    def test_a_hand_off_is_not_waited_for_until_it_is_too_old(self) -> None:
        with Fleet(1, 1, profile=EngineProfile.instant()) as fleet:
            limits = {"kv_lease_duration": 2.0, "decode_seconds_per_token": 0.0, "max_retries": 0}
            router = PDRouter(SchedulerConfig.model_validate({**fleet.config(), **limits}))
            self.assertTrue(router.route_request(TEXT).prefill_instance)
            _call(fleet["decode-0"].url + "/_sim/fault", {"delay": 3600.0})
            result = router.route_request(TEXT)
            self.assertFalse(result.success)
            self.assertIn("no answer within", str(result.error))

    def test_a_prompt_that_kills_has_two_instances_at_most(self) -> None:
        """Each D that it kills means a prefill anew, at a P that may be killed too."""
        with Fleet(2, 3, profile=EngineProfile.instant()) as fleet:
            router = PDRouter(SchedulerConfig.model_validate({**fleet.config(), "max_retries": 5}))
            for instance in fleet.decode:
                _call(instance.url + "/_sim/fault", {"poison": "kills", "abrupt": True})
            self.assertFalse(router.route_request({"prompt": "It kills."}).success)
            self.assertLessEqual(sum(not each.alive for each in fleet.instances), 2)

    def test_a_slow_fleet_is_not_asked_again_and_again(self) -> None:
        with Fleet(1, 3, profile=EngineProfile.instant()) as fleet:
            limits = {"decode_first_byte_timeout": 0.2, "decode_seconds_per_token": 0.0, "max_retries": 2}
            router = PDRouter(SchedulerConfig.model_validate({**fleet.config(), **limits}))
            for instance in fleet.decode:
                _call(instance.url + "/_sim/fault", {"delay": 3600.0})
            results = [router.route_request(TEXT) for _ in range(8)]
            self.assertFalse(any(each.success for each in results))
            requests = [len(_call(each.url + "/_sim/requests")) for each in fleet.decode]
            self.assertLess(sum(requests), 3 * len(results))
            self.assertEqual(len(router.registry.routable(InstanceRole.DECODE)), 3)


class Nonsense(http.server.BaseHTTPRequestHandler):
    """A D that answers what it is told."""

    protocol_version = "HTTP/1.1"
    answer = (200, b"")

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        status, body = self.answer
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class NonsenseTest(unittest.TestCase):
    def setUp(self) -> None:
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Nonsense)
        self.server.daemon_threads = True
        self.addCleanup(self.server.server_close)
        self.addCleanup(self.server.shutdown)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def router(self, *ports: int, **config: Any) -> PDRouter:
        router = PDRouter(SchedulerConfig(**config))
        for port in ports:
            router.register_instance(PDInstance(f"d{port}", InstanceRole.DECODE, "127.0.0.1", port))
            router.registry.probed(router.registry.get(f"d{port}"), None)
        return router

    def test_an_answer_that_cannot_be_read_is_an_error_with_a_reason(self) -> None:
        for body in (b'{"a":"\xff"}', b'{"a":' * 100_000, b"[" * 100_000, b"", b"[]", b"\xff"):
            for status in (200, 400, 500):
                Nonsense.answer = (status, body)
                with self.subTest(body[:20], status=status):
                    result = self.router(self.server.server_port, max_retries=0).route_request(TEXT)
                    self.assertEqual((result.success, result.status), (False, status), result.error)
                    self.assertIsNotNone(result.error)

    def test_our_own_shortage_is_not_theirs(self) -> None:
        router = self.router(1, 2, ejection_failures=1)
        for number in (errno.EMFILE, errno.ENOBUFS, errno.EADDRNOTAVAIL):
            error = OSError(number, "on this machine")
            with mock.patch("asyncio.BaseEventLoop.create_connection", side_effect=error):
                result = router.route_request(TEXT)
            self.assertIn("on this machine", str(result.error))
            self.assertEqual(len(router.registry.routable(InstanceRole.DECODE)), 2)


if __name__ == "__main__":
    unittest.main()
