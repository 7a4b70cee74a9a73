"""A P that must be asked before a request is split with it: what becomes of those it does not answer."""

import time
from collections.abc import Mapping
from typing import Any

from tests.support.routing import BODY, Ask, Case, answer, decode_body
from vllm_pd_scheduler.connectors import Question
from vllm_pd_scheduler.handoff.interfaces import LocalShortage, PrefillFailed
from vllm_pd_scheduler.routing.time_limits import LEASE_SHARE

LENGTH = b'{"choices":[{"finish_reason":"length"}],"usage":{"prompt_tokens":5}}'
STOP = b'{"choices":[{"finish_reason":"stop"}],"usage":{"prompt_tokens":5}}'


class QuestionTest(Case):
    CONFIG: Mapping[str, Any] = {"connector": "mooncake"}
    CONNECTOR = staticmethod(lambda: None)  # type: ignore[assignment]

    def setUp(self) -> None:
        super().setUp()
        self.ask = self.router.ask_prefill = Ask()
        self.freed: list[Any] = []
        self.router.in_flight.handoffs.release = self.freed.append
        self.fail_all(answer(body=LENGTH))

    async def test_the_answer_is_in_the_hand_off(self) -> None:
        forward = await self.route()
        self.assertEqual(self.ask.asked, [("p0", Question(8998, "/query"))])
        ((_, _, _, sent),) = self.leg.sent
        params = decode_body(forward)["kv_transfer_params"]
        self.assertEqual(params["remote_engine_id"], "engine of p0")
        self.assertEqual(params["transfer_id"], sent["kv_transfer_params"]["transfer_id"])

    async def test_another_p_gets_the_request(self) -> None:
        self.ask.failures["p0"] = PrefillFailed("question_timeout")
        forward = await self.route()
        self.assertNotIn("p0", self.leg.tried)
        self.assertEqual(self.leg.tried, [forward.prefill.id])
        name = "pd_scheduler_prefill_failures_total"
        self.assertEqual(self.count(name, prefill="p0", reason="question_timeout"), 1)
        params = decode_body(forward)["kv_transfer_params"]
        self.assertEqual(params["remote_engine_id"], f"engine of {forward.prefill.id}")

    async def test_no_p_answers(self) -> None:
        self.ask.failures = {name: PrefillFailed("question_nonsense") for name in ("p0", "p1", "p2")}
        self.assertLocal(await self.route())
        self.assertEqual(self.leg.tried, [])

    async def test_a_shortage_of_our_own(self) -> None:
        self.ask.failures["p0"] = LocalShortage("question")
        self.assertRejected(await self.route(), 503, "local_resources")

    async def test_nobody_asks(self) -> None:
        """A script of a library user that has a prefill leg and no more."""
        self.router.ask_prefill = None
        self.assertLocal(await self.route())

    async def test_a_p_that_has_failed_is_asked_again(self) -> None:
        self.leg.answers["p0"] = PrefillFailed("reset")
        await self.route()
        self.assertEqual(self.ask.forgotten, ["p0"])

    async def test_each_attempt_has_another_name(self) -> None:
        self.leg.answers["p0"] = answer(500)
        await self.route()
        names = [sent["kv_transfer_params"]["transfer_id"] for _, _, _, sent in self.leg.sent]
        self.assertEqual((len(names), len(set(names))), (2, 2))

    async def test_after_a_stop_d_gets_the_clients_own_body(self) -> None:
        """P has kept nothing, so D would wait for it."""
        self.fail_all(answer(body=STOP))
        forward = await self.route()
        self.assertLocal(forward)
        self.assertEqual(decode_body(forward), BODY)
        self.assertEqual(self.freed, [])

    async def test_it_may_be_used_for_as_long_as_its_settings_say(self) -> None:
        forward = await self.route()
        left = forward.pending.deadline - time.monotonic()
        self.assertAlmostEqual(left, 480 * LEASE_SHARE, delta=60)
