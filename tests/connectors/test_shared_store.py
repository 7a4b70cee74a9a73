"""A store between P and D: no parameters, nothing pinned, nothing stale."""

import json
import math
from collections.abc import Mapping
from typing import Any

from tests.support.connectors import LEGS
from tests.support.routing import BODY, Case, answer, decode_body
from vllm_pd_scheduler.connectors import SharedStoreConnector
from vllm_pd_scheduler.handoff.pending import PendingHandoff
from vllm_pd_scheduler.request.body import JsonBody
from vllm_pd_scheduler.routing.answer_watch import AnswerWatch
from vllm_pd_scheduler.routing.attempts import FailedAttempt, Failure

store = SharedStoreConnector()


def test_p_gets_the_request_for_one_token_without_parameters() -> None:
    body = JsonBody.parse(json.dumps({"model": "m", "prompt": "x", "max_tokens": 9, "stream": True}).encode())
    sent = json.loads(store.prefill_body(body, LEGS))
    assert sent == {"model": "m", "prompt": "x", "max_tokens": 1, "stream": False}


def test_whatever_p_answers_is_a_hand_off_that_never_ends() -> None:
    usage = {"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": 3}}
    found = store.handoff(json.dumps({"usage": usage}).encode(), LEGS)
    assert found is not None
    assert (found.prompt_tokens, found.cached_tokens) == (7, 3)
    assert found.lease == math.inf
    assert not found.pinned
    assert store.handoff(b"not json", LEGS) is not None


class SharedStoreTest(Case):
    CONFIG: Mapping[str, Any] = {"connector": "shared-store"}
    CONNECTOR = staticmethod(lambda: None)  # type: ignore[assignment]

    def setUp(self) -> None:
        super().setUp()
        self.freed: list[PendingHandoff] = []
        self.router.in_flight.handoffs.release = self.freed.append
        self.leg.answers = dict.fromkeys(("p0", "p1", "p2"), answer(body=b'{"usage":{"prompt_tokens":5}}'))

    async def test_d_gets_the_clients_own_body(self) -> None:
        forward = await self.route()
        self.assertEqual(forward.prefill.id, "p0")
        self.assertIsNone(forward.splice)
        self.assertEqual(decode_body(forward), BODY)
        self.assertEqual(forward.prefill.pending_handoffs, 0)
        self.ahead += 3600.0
        forward.release()
        self.assertIdle()
        self.assertEqual(self.freed, [])

    async def test_what_p_had_cached_is_in_a_header(self) -> None:
        """D counts as cached what it finds in the store, whoever has put it there."""
        self.assertNotIn("x-pd-cached-tokens", (await self.route()).headers(), "P does not say")
        for cached in (0, 3):
            usage = {"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": cached}}
            self.fail_all(answer(body=json.dumps({"usage": usage}).encode()))
            forward = await self.route()
            self.assertEqual(forward.headers()["x-pd-cached-tokens"], str(cached))
            watch = AnswerWatch(self.router.in_flight, self.router.registry, forward, 0.0)
            self.assertEqual(watch.client_headers()["x-pd-cached-tokens"], str(cached))

    async def test_nothing_is_freed_when_d_fails(self) -> None:
        forward = await self.route()
        address = str(forward.decode[0].address)
        self.router.in_flight.attempt_failed(FailedAttempt(address, Failure.CONNECT, forward.id, first=True))
        forward.release()
        self.assertEqual(self.freed, [])

    async def test_a_client_that_leaves_before_d_has_the_request(self) -> None:
        forward = await self.route()
        self.router.in_flight.unused(forward)
        self.assertEqual(self.freed, [])
        self.assertIdle()
