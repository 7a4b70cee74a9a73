"""Requests to data-parallel ranks: which of them, what fails for all of them, and what is told to whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tests.routing.test_questions import LENGTH, Ask
from tests.support.routing import BODY, Case, D, P, answer, decode_body
from vllm_pd_scheduler.handoff.interfaces import PrefillFailed
from vllm_pd_scheduler.models import InstanceRole, PDInstance
from vllm_pd_scheduler.routing.attempts import FailedAttempt, Failure
from vllm_pd_scheduler.routing.result import Result
from vllm_pd_scheduler.telemetry import Ending

FLEET: dict[str, tuple[InstanceRole, int]] = {
    "p0": (P, 2), "p1": (P, 2), "d0": (D, 2), "d1": (D, 3), "d2": (D, 1)
}  # fmt: skip


class RanksCase(Case):
    def setUp(self) -> None:
        super().setUp()
        for each in self.router.get_instances():
            self.router.unregister_instance(each.instance_id)
        for number, (name, (role, size)) in enumerate(FLEET.items()):
            place = f"10.0.{number}.1", 8000
            self.router.register_instance(PDInstance(name, role, *place, data_parallel_size=size))
            self.router.registry.probed(self.router.registry.get(name), None)

    def address(self, name: str) -> str:
        return str(self.router.registry.get(name).address)


class ChoiceTest(RanksCase):
    async def test_each_rank_has_its_turn(self) -> None:
        firsts, prefills = Counter[str](), Counter[str]()
        for _ in range(12):
            forward = await self.route()
            firsts[forward.decode[0].id] += 1
            prefills[forward.prefill.id] += 1
            forward.release()
        self.assertEqual(firsts, dict.fromkeys(("d0:0", "d0:1", "d1:0", "d1:1", "d1:2", "d2"), 2))
        self.assertEqual(prefills, dict.fromkeys(("p0:0", "p0:1", "p1:0", "p1:1"), 3))

    async def test_envoy_tries_each_process_once_and_knows_the_rank_of_each(self) -> None:
        for _ in range(12):
            forward = await self.route()
            self.assertEqual({each.instance.instance_id for each in forward.decode}, {"d0", "d1", "d2"})
            ranks = {str(e.address): e.rank for e in forward.decode if e.rank is not None}
            self.assertEqual((forward.ranks, len(ranks)), (ranks, 2))
            destination = forward.headers()["x-gateway-destination-endpoint"].split(",")
            self.assertEqual(len(destination), 3)
            self.assertEqual(forward.headers()["x-pd-prefill"], forward.prefill.id)
            forward.release()

    async def test_a_fleet_without_ranks_is_told_none(self) -> None:
        for name in ("d0", "d1", "p0", "p1"):
            self.router.unregister_instance(name)
        forward = await self.route()
        self.assertEqual((forward.ranks, [e.id for e in forward.decode]), (None, ["d2"]))

    async def test_a_gateway_is_told_one(self) -> None:
        """It sends its further attempts with the same headers."""
        seen = set()
        for _ in range(6):
            forward = await self.route({"prompt": ["a", "b"]})
            forward.for_gateway(fallbacks=True)
            rank = forward.decode[0].rank
            headers = forward.gateway_headers()
            self.assertEqual(headers.get("x-data-parallel-rank"), None if rank is None else str(rank))
            self.assertEqual(len(forward.decode), 3 if rank is None else 1)
            seen.add(rank)
            forward.release()
        self.assertEqual(seen, {None, 0, 1, 2})

    async def test_a_response_is_kept_by_a_process(self) -> None:
        forward = await self.route({"model": "m", "input": "x"}, "/v1/responses")
        kept = decode_body(forward, {"model": "m", "input": "x"})["request_id"]
        keeper = forward.decode[0].instance.instance_id
        for _ in range(4):
            more = {"model": "m", "input": "y", "previous_response_id": kept}
            self.assertEqual((await self.route(more, "/v1/responses")).decode[0].instance.instance_id, keeper)


class FailureTest(RanksCase):
    async def test_no_p_is_tried_by_another_of_its_ranks(self) -> None:
        for found in (PrefillFailed("reset"), answer(503), answer(500), PrefillFailed("connect")):
            with self.subTest(found):
                self.leg.sent.clear()
                self.leg.answers = {f"p0:{rank}": found for rank in range(2)}
                for _ in range(4):
                    forward = await self.route()
                    self.assertEqual(forward.prefill.instance.instance_id, "p1")
                    forward.release()
                tried = Counter(name.partition(":")[0] for name in self.leg.tried)
                self.assertEqual(tried["p1"], 4)
                self.router.registry.ends.succeeded(self.router.registry.get("p0"))

    async def test_all_processes_are_tried(self) -> None:
        self.leg.answers = {f"p{n}:{rank}": PrefillFailed("connect") for n in range(2) for rank in range(2)}
        forward = await self.route()
        self.assertEqual(sorted(name.partition(":")[0] for name in self.leg.tried), ["p0", "p1"])
        self.assertIsNone(forward.prefill)

    async def test_a_prompt_that_one_process_lost_twice_is_not_suspect(self) -> None:
        """It has two ranks, and died with requests on both; a second process makes it suspect."""
        lost = self.router.in_flight.lost
        forwards = {forward.decode[0].id: forward for forward in [await self.route() for _ in range(6)]}
        for name, suspect in (("d0:0", False), ("d0:1", False), ("d1:2", True)):
            forward = forwards[name]
            attempt = FailedAttempt(self.address(name), Failure.RESET, forward.id)
            self.router.in_flight.attempt_failed(attempt)
            self.assertIs(lost.refused_for(forward.prompt, self.router.clock()) > 0, suspect)

    async def test_reports_are_of_the_rank_that_has_the_request(self) -> None:
        """Envoy knows addresses, which all ranks of a process share."""
        for _ in range(6):
            forward = await self.route()
            before = {e.id: e.in_flight for e in self.router.registry}
            first, second = forward.decode[:2]
            attempt = FailedAttempt(str(first.address), Failure.CONNECT, forward.id)
            self.router.in_flight.attempt_failed(attempt)
            after = {e.id: e.in_flight for e in self.router.registry}
            self.assertEqual(after[first.id], before[first.id] - 1)
            self.assertEqual(after[second.id], before[second.id] + 1)
            self.assertIs(forward.answering, second)
            name = "pd_scheduler_decode_attempt_failures_total"
            self.assertGreater(self.count(name, decode=first.id, failure="connect"), 0)
            ended = Result(forward.id, Ending.OK, 200, 1.0, None, None, str(second.address), 10)
            self.router.in_flight.told(ended)
            self.assertEqual(forward.decision.answered_by, second.id)
            forward.release()
        self.assertIdle()

    async def test_a_report_of_nobody_s_request_is_of_the_process(self) -> None:
        for _ in range(3):
            self.router.in_flight.attempt_failed(FailedAttempt(self.address("d1"), Failure.RESET))
        self.assertEqual([self.router.registry.get(f"d1:{rank}").ejected for rank in range(3)], [True] * 3)


class HandoffTest(RanksCase):
    """A protocol whose hand-off names P's rank."""

    CONFIG: Mapping[str, Any] = {"connector": "mooncake"}
    CONNECTOR = staticmethod(lambda: None)  # type: ignore[assignment]

    def setUp(self) -> None:
        super().setUp()
        self.ask = self.router.ask_prefill = Ask()
        self.leg.answers = {
            f"p{number}:{rank}": answer(body=LENGTH) for number in range(2) for rank in range(2)
        }

    async def test_it_is_of_the_rank_that_has_prefilled(self) -> None:
        for _ in range(4):
            forward = await self.route()
            name, _, headers, _ = self.leg.sent[-1]
            self.assertEqual(forward.prefill.id, name)
            params = decode_body(forward)["kv_transfer_params"]
            self.assertEqual(params["remote_engine_id"], f"engine of {name}")
            self.assertIn("x-data-parallel-rank", headers)

    async def test_a_path_that_reads_no_rank_is_not_split(self) -> None:
        forward = await self.route({"model": "m", "input": "x"}, "/v1/responses")
        self.assertEqual((forward.prefill, self.leg.sent), (None, []))
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/messages"):
            body = BODY if path == "/v1/completions" else {
                "model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 9
            }  # fmt: skip
            self.assertIsNotNone((await self.route(body, path)).prefill, path)

    async def test_a_process_that_fails_is_asked_again_for_all_ranks(self) -> None:
        self.leg.answers["p0:0"] = PrefillFailed("reset")
        self.leg.answers["p0:1"] = PrefillFailed("reset")
        (await self.route()).release()
        self.assertEqual(self.ask.forgotten, ["p0:0", "p0:1"])
