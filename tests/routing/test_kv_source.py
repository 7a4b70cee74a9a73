"""P is told to pull what another instance has cached of a prompt, and what is known of that afterwards."""

import asyncio
import contextlib
import json
from collections.abc import Mapping
from typing import Any

from tests.support.routing import BODY, Ask, Case, answer
from vllm_pd_scheduler.handoff.interfaces import PrefillAnswer, PrefillFailed
from vllm_pd_scheduler.records.explained import explained, in_a_line

PROMPT = {**BODY, "prompt": "a long prompt that several have in common " * 2000}


class KvSourceTest(Case):
    CONFIG: Mapping[str, Any] = {
        "connector": {"type": "offloading-p2p", "p2p_port": 7000},
        "tokenize_once": False,
        "disaggregation": "always",
    }
    CONNECTOR = staticmethod(lambda: None)  # type: ignore[assignment]

    def setUp(self) -> None:
        super().setUp()
        self.router.ask_prefill = Ask()
        for name in ("p0", "p1", "p2"):
            self.leg.answers[name] = said()

    async def told(self, body: Any = PROMPT) -> Any:
        forward = await self.route(body)
        self.decision = forward.decision
        forward.release()
        return self.leg.sent[-1][3]["kv_transfer_params"]

    def pulled(self, outcome: str) -> float:
        return self.count("pd_scheduler_pulled_prompt_tokens_total", source="d0", outcome=outcome)

    async def test_the_second_p_pulls_and_the_first_does_not(self) -> None:
        """Round robin takes each P in turn; what reads no prefixes itself is no obstacle."""
        first = await self.told()
        self.assertEqual(list(first), ["remote_decoder"])
        self.assertNotIn("source", in_a_line(self.decision))
        second = await self.told()
        self.assertEqual(list(second), ["remote_decoder", "remote_kv_source"])
        source = second["remote_kv_source"]
        self.assertIn(
            (source["remote_host"], source["remote_port"]), [("10.0.0.1", 7000), ("10.0.0.2", 7000)]
        )
        self.assertNotEqual(source["kv_request_id"], second["remote_decoder"]["kv_request_id"])

    async def test_it_is_shown(self) -> None:
        await self.told()
        self.down("p0")
        await self.told()
        self.assertIn(", source=d0, ", in_a_line(self.decision))
        shown = explained(self.decision, 0.0)["prefill"]["source"]
        self.assertEqual(shown["instance"], "d0")
        self.assertGreater(shown["tokens"], 15_000)
        self.assertEqual(
            (self.pulled("ok"), self.pulled("in_vain")), (self.decision.prefill_attempts[0].pulled, 0)
        )

    async def test_what_has_not_come_is_not_asked_for_again(self) -> None:
        await self.told()
        self.down("p0")
        self.leg.answers = dict.fromkeys(self.leg.answers, said(cached=0))
        self.assertIn("remote_kv_source", await self.told())
        self.assertGreater(self.pulled("in_vain"), 0)
        for name in ("p1", "p2"):  # they have it now, but are to be asked again
            self.router.registry.get(name).holder.clear()
        self.router.registry.get("d1").holder.clear()
        self.assertNotIn("remote_kv_source", await self.told())

    async def test_a_prefill_that_fails_with_a_source(self) -> None:
        await self.told()
        self.down("p0")
        self.leg.answers = {"p2": PrefillFailed("timeout"), "p1": said()}
        forward = await self.route(PROMPT)
        self.assertEqual(self.leg.tried[1:], ["p2", "p1"])
        params = [sent[3]["kv_transfer_params"] for sent in self.leg.sent]
        self.assertIn("remote_kv_source", params[1])
        self.assertNotEqual(
            params[2].get("remote_kv_source", {}).get("remote_host"),
            params[1]["remote_kv_source"]["remote_host"],
            "it may have been the source",
        )
        forward.release()
        self.assertIdle()

    async def test_what_says_nothing_of_the_source(self) -> None:
        """P is full, or refuses the request, or its client has left."""
        await self.told()
        self.down("p0")
        for found in (answer(503), answer(400)):
            self.leg.answers = {"p2": found, "p1": said()}
            (await self.route(PROMPT)).release()
            for name in ("p1", "p2"):
                self.router.registry.get(name).holder.clear()
        self.assertEqual(self.pulled("in_vain"), 0)
        self.leg.hold = asyncio.Event()
        self.leg.entered.clear()
        leaving = asyncio.ensure_future(self.route(PROMPT))
        await self.leg.entered.wait()
        self.assertIn("remote_kv_source", self.leg.sent[-1][3]["kv_transfer_params"])
        leaving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await leaving
        self.assertEqual(self.pulled("in_vain"), 0)
        self.assertIdle()

    async def test_short_prompts_are_computed(self) -> None:
        self.leg.answers = dict.fromkeys(self.leg.answers, said(tokens=450))
        for _ in range(4):
            self.assertEqual(list(await self.told({**BODY, "prompt": "short " * 300})), ["remote_decoder"])


class WithoutPullTest(Case):
    """Other connectors."""

    async def test_nothing_is_hashed_for_them(self) -> None:
        for _ in range(3):
            await self.route(PROMPT)
        self.assertEqual(len(self.router.registry.prefixes), 0)


def said(cached: int | None = None, tokens: int = 20_000) -> PrefillAnswer:
    choice = {"index": 0, "text": " a", "finish_reason": "length"}
    details = None if cached is None else {"cached_tokens": cached}
    usage = {"prompt_tokens": tokens, "prompt_tokens_details": details}
    return answer(body=json.dumps({"choices": [choice], "usage": usage, "kv_transfer_params": None}).encode())
