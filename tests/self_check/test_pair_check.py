"""The three requests of a try: what is sent, what is counted, and what becomes of the hand-off."""

from __future__ import annotations

import asyncio
import json
import unittest
from collections.abc import Mapping
from typing import Any

from tests.support.routing import PARAMS, Leg, answer
from tests.support.waiting import until
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.connectors import Attempt, Connector, NixlConnector, Order, Peer
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.handoff.interfaces import PrefillAnswer, PrefillFailed
from vllm_pd_scheduler.handoff.pending import PendingHandoff
from vllm_pd_scheduler.instance_http.errors import ConnectionLost, RequestFailed, TimedOut
from vllm_pd_scheduler.instance_http.exchange import Answer
from vllm_pd_scheduler.models import InstanceRole, PDInstance
from vllm_pd_scheduler.router import PDRouter
from vllm_pd_scheduler.self_check.comparison import Verdict
from vllm_pd_scheduler.self_check.pair_check import PairCheck, Try

P, D = InstanceRole.PREFILL, InstanceRole.DECODE


class Pool:
    """Answers as D: in turn what it was given, which may be an error."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.answers: list[bytes | int | Exception] = []
        self.sent: list[tuple[dict[str, str], Any, float]] = []
        self.in_flight: list[tuple[int, int]] = []

    def post(
        self, to: Any, path: str, headers: Mapping[str, str], body: bytes, *, limit: int, timeout: float
    ) -> asyncio.Future[Answer]:
        assert (to, path) == (("10.0.0.2:80", None), "/v1/completions")
        self.sent.append((dict(headers), json.loads(body), timeout))
        self.in_flight.append((self.case.d.in_flight, self.case.p.pending_handoffs))
        found = self.answers.pop(0)
        future = asyncio.get_running_loop().create_future()
        if isinstance(found, Exception):
            future.set_exception(found)
        else:
            text = found if isinstance(found, bytes) else b"{}"
            future.set_result(Answer(200 if isinstance(found, bytes) else found, {}, text))
        return future


def text(said: str) -> bytes:
    return json.dumps({"choices": [{"text": said}]}).encode()


class DecodeFirst(NixlConnector):
    def order(self, prefill: Peer) -> Order:
        return "decode first"  # type: ignore[return-value]  # whatever else there will be


class Case(unittest.IsolatedAsyncioTestCase):
    def setUp(self) -> None:
        self.start()

    def start(self, connector: Connector | None = None) -> None:
        self.now = 100.0
        self.leg, self.pool = Leg(), Pool(self)
        self.router = PDRouter(
            SchedulerConfig(), connector=connector or NixlConnector(), clock=lambda: self.now
        )
        self.freed: list[PendingHandoff] = []
        self.router.in_flight.handoffs.release = self.freed.append
        for name, role, host, key in (("p", P, "10.0.0.1", None), ("d", D, "10.0.0.2", "d's key")):
            self.router.register_instance(PDInstance(name, role, host, 80, key))
        self.p, self.d = self.router.registry
        for endpoint in (self.p, self.d):
            self.router.registry.probed(endpoint, None)

        async def nobody(*_: object) -> Any:
            raise AssertionError("no question")

        self.try_pair = PairCheck(
            self.router.config,
            self.router.registry,
            self.router.connectors,
            self.router.in_flight,
            self.router.telemetry,
            self.pool,  # type: ignore[arg-type]
            self.prefill,
            nobody,  # type: ignore[arg-type]
            self.router.clock,
        )

    async def prefill(
        self,
        endpoint: Endpoint,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        attempt: Attempt,
        sent: Any = None,
    ) -> PrefillAnswer:
        return await self.leg(endpoint, path, headers, body, attempt)

    async def tried(self, *answers: bytes | int | Exception) -> Try:
        self.pool.answers = list(answers)
        found = await self.try_pair("m", self.p, self.d)
        self.assertEqual((self.p.in_flight, self.d.in_flight, self.p.pending_handoffs), (0, 0, 0))
        self.assertEqual(self.p.breaker.failures + self.d.breaker.failures, 0, "nobody is blamed")
        return found

    def stranded(self) -> float:
        labels = {"prefill": "p", "outcome": "stranded"}
        name = "pd_scheduler_handoffs_unused_total"
        return self.router.telemetry.prometheus.get_sample_value(name, labels) or 0.0


class PairCheckTest(Case):
    async def test_what_is_sent(self) -> None:
        self.assertEqual((await self.tried(text("a"), text("a"))).verdict, Verdict.MATCH)
        ((_, _, headers, prefilled),) = self.leg.sent
        (split_headers, split, within), (_, whole, _) = self.pool.sent
        self.assertEqual(split.pop("kv_transfer_params"), PARAMS)
        prefilled.pop("kv_transfer_params")
        self.assertNotIn("kv_transfer_params", whole)
        self.assertEqual((prefilled["max_tokens"], split["max_tokens"]), (1, 16))
        salts = {split.pop("cache_salt"), whole.pop("cache_salt")}
        self.assertEqual((split, len(salts)), (whole, 2))
        self.assertEqual((split["temperature"], split["ignore_eos"], split["model"]), (0, True, "m"))
        self.assertEqual(split_headers["authorization"], "Bearer d's key")
        self.assertEqual(split_headers["x-request-id"], headers["x-request-id"])
        self.assertLessEqual(within, 0.8 * 30)
        self.assertEqual(self.leg.in_flight, [1])
        self.assertEqual(self.pool.in_flight, [(1, 1), (1, 0)])
        self.assertEqual(self.freed, [], "it was used")
        await self.tried(text("a"), text("b"))
        self.assertNotEqual(self.leg.sent[1][3]["prompt"], split["prompt"])

    async def test_a_d_that_has_not_used_it(self) -> None:
        for number, failure in enumerate((500, 429, 404, ConnectionLost("reset"), RequestFailed("odd"))):
            self.assertEqual((await self.tried(failure)).verdict, Verdict.FAILED)
            self.assertEqual((len(self.freed), self.stranded()), (number + 1, 0))

    async def test_one_that_may_be_using_it(self) -> None:
        self.assertEqual((await self.tried(TimedOut("no answer within 24 s"))).verdict, Verdict.FAILED)
        self.assertEqual((self.freed, self.stranded()), ([], 1))

    async def test_one_that_fails_without_it(self) -> None:
        self.assertEqual((await self.tried(text("a"), 503)).reason, "D answers 503")
        self.assertEqual((self.freed, self.stranded()), ([], 0))

    async def test_a_hand_off_that_is_too_old(self) -> None:
        self.router.config.__dict__["kv_lease_duration"] = 0.0
        found = await self.tried()
        self.assertEqual(
            (found.verdict, found.reason), (Verdict.FAILED, "the hand-off was too old to be used")
        )
        self.assertEqual(len(self.freed), 1)

    async def test_p(self) -> None:
        for given, words in (
            (answer(500), "P answers 500"),
            (answer(params=None), "P hands nothing over"),
            (PrefillFailed("connect"), "connect"),
        ):
            self.leg.answers["p"] = given
            found = await self.tried()
            self.assertEqual((found.verdict, found.reason), (Verdict.FAILED, words))
        self.assertEqual((self.pool.sent, self.freed), ([], []))

    async def test_it_is_ended_while_d_answers(self) -> None:
        self.pool.answers = [text("a")]
        self.pool.post = lambda *_, **__: asyncio.get_running_loop().create_future()  # type: ignore[method-assign]
        running = asyncio.ensure_future(self.try_pair("m", self.p, self.d))
        await self.leg.entered.wait()

        async def sent() -> bool:
            return self.d.in_flight > 0

        await until(sent)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        self.assertEqual((self.p.in_flight, self.d.in_flight, self.p.pending_handoffs), (0, 0, 0))
        self.assertEqual(len(self.freed), 1)

    async def test_another_order_is_not_tried(self) -> None:
        self.start(DecodeFirst())
        found = await self.tried()
        self.assertIn(found.verdict, (Verdict.SKIPPED, Verdict.FAILED))
        self.assertEqual((self.leg.sent, self.pool.sent), ([], []))


if __name__ == "__main__":
    unittest.main()
