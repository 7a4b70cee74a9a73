"""A protocol whose P must know D: the one that is chosen first gets the hand-off, or nobody does."""

import json
import time
from collections.abc import Mapping
from typing import Any

from tests.support.routing import Case, answer, decode_body
from vllm_pd_scheduler.handoff.interfaces import PrefillAnswer
from vllm_pd_scheduler.handoff.pending import PendingHandoff


class DecodeFirstTest(Case):
    CONFIG: Mapping[str, Any] = {"connector": "moriio"}
    CONNECTOR = staticmethod(lambda: None)  # type: ignore[assignment]

    def setUp(self) -> None:
        super().setUp()
        self.freed: list[PendingHandoff] = []
        self.router.in_flight.handoffs.release = self.freed.append
        leg = self.leg

        async def echo(*args: Any) -> PrefillAnswer:
            found = await leg(*args)
            if found.status != 200:
                return found
            self.told = leg.sent[-1][3]["kv_transfer_params"]
            host = {"remote_host": "10.0.0.1", "remote_engine_id": "e", "remote_block_ids": [[1, 2]]}
            params = {**self.told, **host, "do_remote_prefill": True, "do_remote_decode": False}
            self.before_answer()
            return answer(body=json.dumps({"kv_transfer_params": params}).encode())

        self.router.prefill_leg = echo
        self.told: dict[str, Any] = {}
        self.before_answer = lambda: None

    async def test_p_is_told_of_the_d_that_gets_the_hand_off(self) -> None:
        for _ in range(3):
            forward = await self.route()
            decode = forward.decode[0]
            self.assertEqual(self.told["remote_host"], decode.host)
            params = decode_body(forward)["kv_transfer_params"]
            self.assertEqual(params["transfer_id"], self.told["transfer_id"])
            self.assertIs(forward.pending.decode, decode)
        self.assertEqual([name for name, *_ in self.leg.sent], ["p0", "p1", "p2"])

    async def test_both_kinds_of_envoy_set_the_headers_of_a_hand_off(self) -> None:
        """Out of a client's request id the engine would read addresses of peers."""
        forward = await self.route(x_request_id="___prefill_addr_evil:1___decode_addr_evil:2_0")
        for headers in (forward.headers(), forward.gateway_headers()):
            self.assertEqual(headers["x-request-id"], forward.pending.attempt.legs.id)

    async def test_each_d_has_its_turn_once(self) -> None:
        """The choice before is the choice: the strategy is not asked twice."""
        seen = [(await self.route()).decode[0].id for _ in range(6)]
        self.assertEqual(seen, ["d0", "d1", "d2"] * 2)

    async def test_a_d_that_has_gone_meanwhile_leaves_the_hand_off_to_nobody(self) -> None:
        self.before_answer = lambda: self.down("d0")
        forward = await self.route()
        self.assertLocal(forward)
        self.assertNotEqual(forward.decode[0].id, "d0")
        self.assertEqual(len(self.freed), 1)

    async def test_a_d_that_was_removed_meanwhile(self) -> None:
        self.before_answer = lambda: self.router.unregister_instance("d0")
        self.assertLocal(await self.route())
        self.assertEqual(len(self.freed), 1)

    async def test_a_d_that_is_full_meanwhile_gets_it_all_the_same(self) -> None:
        """P has its blocks for this one alone."""
        registry = self.router.registry
        self.before_answer = lambda: registry.ends.overloaded(registry.get("d0"), time.monotonic(), 5.0)
        forward = await self.route()
        self.assertEqual(forward.decode[0].id, "d0")
        self.assertIn("kv_transfer_params", decode_body(forward))

    async def test_another_attempt_is_another_hand_off(self) -> None:
        self.leg.answers["p0"] = answer(500)
        forward = await self.route()
        names = [sent["kv_transfer_params"]["transfer_id"] for _, _, _, sent in self.leg.sent]
        self.assertEqual((len(names), len(set(names))), (2, 2))
        self.assertEqual(self.told["remote_host"], forward.decode[0].host)

    async def test_without_a_d_there_is_no_prefill(self) -> None:
        self.down("d0", "d1", "d2")
        self.assertRejected(await self.route(), 503, "no_decode")
        self.assertEqual(self.leg.sent, [])


class ReadTest(Case):
    CONFIG: Mapping[str, Any] = {"connector": {"type": "moriio", "mode": "read"}}
    CONNECTOR = staticmethod(lambda: None)  # type: ignore[assignment]

    async def test_where_d_reads_it_is_chosen_last(self) -> None:
        await self.route()
        self.assertNotIn("remote_host", self.leg.sent[0][3]["kv_transfer_params"])
