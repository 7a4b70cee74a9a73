"""Which encode instances get what, and what becomes of a request when they fail."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from tests.support.encode import EncodeLeg, chat, told, where
from tests.support.routing import PARAMS, Case, answer, decode_body
from tests.support.waiting import until
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.handoff.interfaces import LocalShortage, PrefillAnswer, PrefillFailed
from vllm_pd_scheduler.models import InstanceRole, PDInstance
from vllm_pd_scheduler.request.errors import Reject
from vllm_pd_scheduler.routing.encode import AT_ONCE, SLACK

CHAT = "/v1/chat/completions"


class EncodeCase(Case):
    def setUp(self) -> None:
        super().setUp()
        self.encode = self.router.encode_leg = EncodeLeg()
        for number in range(2):
            self.add(PDInstance(f"e{number}", InstanceRole.ENCODE, "10.0.0.3", 8000 + number))

    def add(self, instance: PDInstance) -> Endpoint:
        self.router.register_instance(instance)
        endpoint = self.router.registry.get(instance.instance_id)
        self.router.registry.probed(endpoint, None)
        return endpoint

    def endpoint(self, name: str) -> Endpoint:
        return self.router.registry.get(name)

    async def chat(self, *names: str, **more: Any) -> Any:
        forward = await self.route(chat(*names, **more), CHAT, x_request_id="id")
        self.assertNotIsInstance(forward, Reject)
        return forward

    def at_p(self) -> Any:
        return self.leg.sent[-1][3].get("ec_transfer_params")

    def left(self, reason: str, name: str = "e0") -> float:
        return self.count("pd_scheduler_encode_failures_total", encode=name, reason=reason)

    def items(self) -> tuple[float, float]:
        name = "pd_scheduler_media_items_total"
        return self.count(name, outcome="encoded"), self.count(name, outcome="left")


class EncodedTest(EncodeCase):
    async def test_each_item_by_itself_and_all_together_to_p(self) -> None:
        forward = await self.chat("a", "b", "c", "b")
        self.assertEqual(sorted(name for _, name in self.encode.sent), ["a", "b", "c"])
        self.assertEqual(sorted(map(str, self.encode.ids)), ["id-0", "id-1", "id-2"])
        self.assertEqual(self.at_p(), {f"hash-{name}": where(name) for name in "abc"})
        body = chat("a", "b", "c", "b")
        self.assertEqual(decode_body(forward, body), {**body, "kv_transfer_params": PARAMS})
        self.assertEqual(self.items(), (3.0, 0.0))
        forward.release()
        self.assertIdle()

    async def test_nobody_is_asked_without_items(self) -> None:
        await self.chat()
        await self.route()
        self.assertEqual(self.encode.sent, [])
        self.assertIsNone(self.at_p())

    async def test_d_that_prefills_gets_it(self) -> None:
        body = chat("a", n=2)
        forward = await self.chat("a", n=2)
        field = {"ec_transfer_params": {"hash-a": where("a")}}
        self.assertIsNone(forward.body, "Envoy has it")
        self.assertEqual(decode_body(forward, body), {**body, **field})
        self.fail_all(PrefillFailed("connect"))
        forward = await self.chat("a")
        self.assertEqual(decode_body(forward, chat("a")), {**chat("a"), **field})

    async def test_a_gateway_is_told_one_d_for_it(self) -> None:
        forward = await self.chat("a", n=2)
        forward.for_gateway(fallbacks=True)
        self.assertEqual(len(forward.decode), 1)

    async def test_a_body_that_does_not_fit_with_it(self) -> None:
        size = len(json.dumps(chat("a", n=2)))
        self.router.config.take(
            self.router.config.model_copy(update={"max_body_bytes": size}), ["max_body_bytes"]
        )
        forward = await self.chat("a", n=2)
        self.assertIsNone(forward.splice)

    async def test_a_clients_own_is_cut_out(self) -> None:
        forward = await self.chat("a", ec_transfer_params={"hash-a": "evil"})
        self.assertEqual(self.at_p(), {"hash-a": where("a")})
        self.assertNotIn("ec_transfer_params", decode_body(forward))
        for path in (CHAT, "/v1/completions", "/v1/embeddings"):
            forward = await self.route({"input": "x", "prompt": "x", "ec_transfer_params": {"x": 1}}, path)
            self.assertNotIn(b"ec_transfer", forward.body)

    async def test_it_is_noted(self) -> None:
        await self.chat("a", "b")
        shown = self.router.decisions.as_json(self.router.decisions.after(0)[-1])["encode"]
        self.assertEqual((shown["items"], shown["encoded"]), (2, 2))
        self.assertEqual([each["outcome"] for each in shown["attempts"]], ["ok", "ok"])

    async def test_so_many_at_a_time(self) -> None:
        await self.chat(*(f"i{number}" for number in range(3 * AT_ONCE)))
        self.assertEqual(self.encode.most, AT_ONCE)
        self.assertEqual(self.items(), (3 * AT_ONCE, 0))
        self.assertEqual({name for name, _ in self.encode.sent}, {"e0", "e1"})


class WhoTest(EncodeCase):
    async def test_the_one_that_has_had_it(self) -> None:
        await self.chat("a")
        (first,) = self.encode.of("a")
        other = self.endpoint("e0" if first == "e1" else "e1")
        busy = [self.router.registry.work.reserve(self.endpoint(first)) for _ in range(SLACK)]
        await self.chat("a")
        self.assertEqual(self.encode.of("a"), [first, first])
        busy.append(self.router.registry.work.reserve(self.endpoint(first)))
        await self.chat("a")
        self.assertEqual(self.encode.of("a")[-1], other.id)
        for each in busy:
            each.release()

    async def test_at_once_the_same_one(self) -> None:
        self.encode.hold = asyncio.Event()
        tasks = [asyncio.ensure_future(self.chat("a")) for _ in range(3)]
        await until(lambda: self.encode.running == 3)
        self.assertEqual(len(set(self.encode.of("a"))), 1)
        self.encode.hold.set()
        await asyncio.gather(*tasks)

    async def test_the_one_with_the_fewest_requests(self) -> None:
        busy = self.router.registry.work.reserve(self.endpoint("e0"))
        await self.chat("a")
        self.assertEqual(self.encode.of("a"), ["e1"])
        busy.release()

    async def test_a_full_one_gets_nothing(self) -> None:
        now = self.router.clock()
        self.router.registry.ends.overloaded(self.endpoint("e0"), now, 10.0)
        await self.chat("a", "b", "c")
        self.assertEqual({name for name, _ in self.encode.sent}, {"e1"})
        self.router.registry.ends.overloaded(self.endpoint("e1"), now, 10.0)
        forward = await self.chat("d")
        self.assertEqual(self.encode.of("d"), [])
        self.assertEqual(forward.prefill.id[0], "p")
        self.assertEqual(self.items(), (3.0, 1.0))

    async def test_one_of_another_model_gets_nothing(self) -> None:
        self.router.registry.models.listed(self.endpoint("e0"), frozenset({"other"}))
        self.router.registry.models.listed(self.endpoint("e1"), frozenset({"m"}))
        await self.chat("a", "b", "c")
        self.assertEqual({name for name, _ in self.encode.sent}, {"e1"})

    async def test_one_of_a_revision_waits_until_all_are_of_it(self) -> None:
        self.down("e0", "e1")
        self.add(PDInstance("new", InstanceRole.ENCODE, "10.0.0.4", 8000, revision="r2"))
        await self.chat("a")
        self.assertEqual(self.encode.sent, [])
        for name in ("p0", "p1", "p2", "d0", "d1", "d2"):
            old = self.endpoint(name).instance
            changed = PDInstance(name, old.role, old.host, old.port, revision="r2")
            self.router.registry.describe(name, changed)
        await self.chat("a")
        self.assertEqual(self.encode.of("a"), ["new"])

    async def test_no_e_that_serves(self) -> None:
        self.down("e0", "e1")
        await self.chat("a")
        self.assertEqual((self.encode.sent, self.items()), ([], (0.0, 0.0)))


class FailsTest(EncodeCase):
    async def test_another_one_is_tried(self) -> None:
        cases: list[tuple[PrefillAnswer | Exception, str]] = [
            (answer(500), "status_500"),
            (answer(503), "status_503"),
            (answer(429), "status_429"),
            (answer(302), "status_302"),
            (PrefillFailed("connect"), "connect"),
            (PrefillFailed("timeout"), "timeout"),
            (told(None), "no_handoff"),
            (told({"x": 7}), "no_handoff"),
            (PrefillAnswer(200, "text/html", b"<html>"), "no_handoff"),
        ]
        for failure, reason in cases:
            with self.subTest(reason):
                self.setUp()
                busy = self.router.registry.work.reserve(self.endpoint("e1"))
                self.encode.answers = {"e0": failure}
                await self.chat("a")
                busy.release()
                self.assertEqual(self.encode.of("a"), ["e0", "e1"])
                self.assertEqual(self.at_p(), {"hash-a": where("a")})
                self.assertEqual(self.left(reason), 1.0)

    async def test_p_encodes_what_no_e_has(self) -> None:
        self.encode.answers = dict.fromkeys(("e0", "e1"), answer(500))
        await self.chat("a")
        self.assertEqual(sorted(self.encode.of("a")), ["e0", "e1"])
        self.assertIsNone(self.at_p())
        self.assertEqual(self.items(), (0.0, 1.0))

    async def test_a_part_is_better_than_nothing(self) -> None:
        self.down("e1")
        self.encode.answers = {"e0": told({"h": where("x")})}
        await self.chat("a", "b")  # both say the same of one hash
        self.assertEqual(self.at_p(), {"h": where("x")})

    async def test_what_e_refuses_is_ps_to_judge(self) -> None:
        for status in (400, 401, 404, 413, 422):
            with self.subTest(status):
                self.setUp()
                self.encode.answers = dict.fromkeys(("e0", "e1"), answer(status))
                await self.chat("a")
                self.assertEqual(len(self.encode.of("a")), 1)
                self.assertIsNone(self.at_p())
                self.assertEqual(self.endpoint("e0").breaker.failures, 0)

    async def test_an_item_at_which_one_was_lost_goes_to_no_second_one(self) -> None:
        self.encode.answers = dict.fromkeys(("e0", "e1"), PrefillFailed("reset", lost=True))
        self.leg.answers = dict.fromkeys(("p0", "p1", "p2"), PrefillFailed("reset", lost=True))
        outcome = await self.route(chat("a"), CHAT)
        self.assertEqual(len(self.encode.of("a")), 1)
        self.assertRejected(outcome, 503, "lost")
        self.assertEqual(len(self.leg.tried), 1, "one E and one P have died of it")

    async def test_another_rank_of_one_that_has_failed_is_not_another_one(self) -> None:
        self.down("e0", "e1")
        ranked = PDInstance("e2", InstanceRole.ENCODE, "10.0.0.4", 8000, data_parallel_size=3)
        self.add(ranked)
        names = [f"e2:{rank}" for rank in range(3)]
        self.encode.answers = dict.fromkeys(names, PrefillFailed("connect"))
        await self.chat("a")
        self.assertEqual(len(self.encode.sent), 1)
        self.add(PDInstance("e3", InstanceRole.ENCODE, "10.0.0.5", 8000))
        busy = self.router.registry.work.reserve(self.endpoint("e3"))
        await self.chat("b")
        busy.release()
        self.assertEqual(self.encode.of("b")[-1], "e3")
        self.assertEqual(len(self.encode.of("b")), 2)

    async def test_the_ranks_of_one_that_dies_are_one_that_dies(self) -> None:
        self.down("e0", "e1")
        self.add(PDInstance("e2", InstanceRole.ENCODE, "10.0.0.4", 8000, data_parallel_size=2))
        self.encode.answers = dict.fromkeys(("e2:0", "e2:1"), PrefillFailed("reset", lost=True))
        forward = await self.chat("a", "b")
        self.assertEqual({name for name, _ in self.encode.sent}, {"e2:0", "e2:1"})
        self.assertEqual(forward.prefill.id[0], "p")

    async def test_an_item_at_which_all_fail_is_nobodys_fault(self) -> None:
        """Else a client that sends a broken image over and over would have E ejected."""
        self.encode.answers = dict.fromkeys(("e0", "e1"), answer(500))
        for number in range(9):
            await self.chat(f"broken-{number}")
        self.assertTrue(all(self.endpoint(name).routable for name in ("e0", "e1")))

    async def test_a_shortage_of_ours_is_no_e_s_fault(self) -> None:
        self.encode.answers = dict.fromkeys(("e0", "e1"), LocalShortage("EMFILE"))
        await self.chat("a")
        self.assertEqual(self.endpoint("e0").breaker.failures, 0)
        self.assertEqual(self.count("pd_scheduler_local_errors_total", kind="EMFILE"), 1.0)

    async def test_the_stage_ends_in_time(self) -> None:
        settings = self.router.config.model_copy(update={"encode_timeout": 0.01})
        self.router.config.take(settings, ["encode_timeout"])
        self.encode.hold = asyncio.Event()
        await self.chat(*(f"i{number}" for number in range(2 * AT_ONCE)))
        self.assertIsNone(self.at_p())
        self.assertEqual(self.items(), (0.0, 2.0 * AT_ONCE))
        await asyncio.sleep(0)
        self.assertEqual(self.encode.running, 0)

    async def test_a_client_that_leaves(self) -> None:
        self.encode.hold = asyncio.Event()
        task = asyncio.ensure_future(self.chat("a", "b"))
        await self.encode.entered.wait()
        task.cancel()
        with self.assertRaises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        self.assertEqual((self.encode.running, self.leg.tried), (0, []))
        self.assertIdle()


class SharedStorageTest(EncodeCase):
    CONFIG: Mapping[str, Any] = {"encode_connector": "ec-example"}

    async def test_nothing_is_passed_on(self) -> None:
        self.encode.answers = dict.fromkeys(("e0", "e1"), told(None))
        await self.chat("a", "b")
        self.assertIsNone(self.at_p())
        self.assertEqual(self.items(), (2.0, 0.0))


class SidecarTest(EncodeCase):
    CONFIG: Mapping[str, Any] = {"prefill_leg": "sidecar"}

    async def test_sidecars_have_a_stage_of_their_own(self) -> None:
        await self.chat("a")
        self.assertEqual(self.encode.sent, [])
