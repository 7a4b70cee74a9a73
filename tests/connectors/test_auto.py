"""A connector that reads which protocol P speaks from what it answers."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from msgspec.structs import replace

from tests.connectors.test_nixl import ANSWER, PARAMS, TEXT, body
from tests.connectors.test_nixl_push import PUSHED
from tests.support.connectors import LEGS
from tests.support.routing import Case, Leg, answer
from vllm_pd_scheduler.connectors import Attempt, AutoConnector, Handoff, Legs, NixlConnector
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.handoff.interfaces import PrefillAnswer
from vllm_pd_scheduler.records.events import Event
from vllm_pd_scheduler.request.api import RESPONSES
from vllm_pd_scheduler.request.body import JsonBody
from vllm_pd_scheduler.routing.answer_watch import AnswerWatch

auto = AutoConnector()
ASCEND = PARAMS | {"num_prompt_blocks": 3, "remote_multi_nodes_meta_mapping": {}, "last_token_id": 5}


def speaking(protocol: str) -> Legs:
    return replace(LEGS, prefill=replace(LEGS.prefill, speaks=protocol))


def handoff(params: Any, legs: Legs = LEGS) -> Handoff | None:
    return auto.handoff(json.dumps({**ANSWER, "kv_transfer_params": params}).encode(), legs)


def test_a_p_that_has_not_answered_yet_is_asked_as_nixl_is() -> None:
    for protocol in ("", "nixl"):
        legs = speaking(protocol)
        assert auto.prefill_body(body(TEXT), legs) == NixlConnector().prefill_body(body(TEXT), legs)
    assert auto.prefill_headers(LEGS) == {"x-request-id": "run-0-push"}, "it may push"


def test_nothing_changes_for_a_p_that_lets_d_pull() -> None:
    raw = json.dumps(ANSWER).encode()
    for protocol in ("", "nixl"):
        found, nixl = auto.handoff(raw, speaking(protocol)), NixlConnector().handoff(raw, LEGS)
        assert found is not None
        assert replace(found, protocol="") == nixl
        assert found.protocol == "nixl"
    assert auto.prefill_headers(speaking("nixl")) == {}


def test_a_p_that_pushes() -> None:
    for protocol in ("", "nixl-push"):
        legs = speaking(protocol)
        found = handoff(PUSHED, legs)
        assert found is not None
        assert (found.protocol, found.released_by, found.lease) == ("nixl-push", 200, None)
        assert found.headers == auto.prefill_headers(legs)
        assert b'"max_tokens":1,' in (auto.release_body(found, "m") or b"")


def test_a_p_that_pushes_of_which_that_was_not_known() -> None:
    """It knows the request by the client's id: that hand-off is not used, and the next one is right."""
    found = handoff(PUSHED | {"remote_request_id": "cmpl-of-the-client-0-1a2b3c4d"}, speaking("nixl"))
    assert found is not None
    assert found.lease is not None
    assert 0 < found.lease < 1e-6
    assert found.protocol == "nixl-push"


def test_an_ascend_p_may_not_stop() -> None:
    found = handoff(ASCEND)
    assert found is not None
    assert found.protocol == "ascend-mooncake"
    sent = json.loads(auto.prefill_body(body(TEXT | {"stop": ["x"]}), speaking(found.protocol)))
    assert sent["min_tokens"] == 1
    assert "stop" not in sent
    assert auto.prefill_headers(speaking(found.protocol)) == {}


def test_a_p_that_must_be_configured() -> None:
    """It has one prompt in vain, and what it has kept of that is not used."""
    found = handoff({"do_remote_prefill": True, "remote_notify_port": 61005, "remote_handshake_port": 6301})
    assert found is not None
    assert found.protocol == "moriio"
    assert found.lease is not None
    assert 0 < found.lease < 1e-6
    with pytest.raises(ValueError, match='set its connector to "moriio"'):
        auto.prefill_body(body(TEXT), speaking(found.protocol))


@pytest.mark.parametrize("params", [None, {}, {"do_remote_prefill": True}, PUSHED | {"tp_size": None}])
def test_without_a_hand_off_nothing_is_known(params: Any) -> None:
    assert handoff(params) is None


class Pushing(Leg):
    """A P that knows requests by the id that it gets."""

    async def __call__(
        self,
        endpoint: Endpoint,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        attempt: Attempt,
        sent: Any = None,
    ) -> PrefillAnswer:
        known_as = {**headers, **attempt.prefill_headers()}["x-request-id"]
        self.answers[endpoint.id] = answer(
            params=PUSHED | {"remote_request_id": f"cmpl-{known_as}-0-1a2b3c4d"}
        )
        return await super().__call__(endpoint, path, headers, body, attempt)


class RememberedTest(Case):
    """What an answer shows is used from the next request on, is told once, and ends with the process."""

    CONNECTOR = AutoConnector
    CONFIG: Mapping[str, Any] = {"max_retries": 2}

    def told(self) -> list[Event]:
        return [each for each in self.router.events.after(0) if "hands over by" in each.text]

    async def ids(self, count: int) -> list[str]:
        """The ids that P had for this many requests whose client calls all of them `own`."""
        before = len(self.leg.sent)
        for _ in range(count):
            forward = await self.route(**{"x-request-id": "own"})
            self.sent_to_d = forward.headers()
            watch = AnswerWatch(self.router.in_flight, self.router.registry, forward, 0.0)
            self.given_back = watch.client_headers().get("x-request-id")
            forward.release()
        return [headers["x-request-id"] for _, _, headers, _ in self.leg.sent[before:]]

    async def test_pulled(self) -> None:
        first = await self.ids(3)  # one for each P
        self.assertEqual(len({*first, "own"}), 4)
        self.assertEqual(await self.ids(6), ["own"] * 6)
        self.assertNotIn("x-request-id", self.sent_to_d)
        self.assertIsNone(self.given_back)
        self.assertEqual(
            {each.text for each in self.told()},
            {f"p{n} hands over by nixl, as its answer shows" for n in range(3)},
        )
        self.assertEqual(len(self.told()), 3)

    async def test_pushed(self) -> None:
        self.leg = self.router.prefill_leg = Pushing()
        for _ in range(2):
            ids = await self.ids(3)
            self.assertEqual(len({*ids, "own"}), 4)
            self.assertEqual(
                (self.sent_to_d["x-request-id"], self.sent_to_d["x-pd-request-id"]), (ids[-1], "own")
            )
        self.assertEqual(self.given_back, "own")
        self.assertEqual(len(self.told()), 3)

    async def test_a_restart(self) -> None:
        registry = self.router.registry
        p0 = registry.get("p0")
        registry.started(p0, 1.0)
        await self.ids(3)
        self.assertEqual(p0.spoken.protocol, "nixl")
        registry.started(p0, 2.0)
        self.assertEqual(p0.spoken.protocol, "")

    async def test_another_connector_without_a_restart_that_was_seen(self) -> None:
        await self.ids(3)
        self.router.prefill_leg = Pushing()
        own = {"x-request-id": "own"}
        for _ in range(3):
            self.assertLocal(await self.route(**own))
        self.assertIsNotNone((await self.route(**own)).prefill)
        self.assertEqual(self.count("pd_scheduler_handoffs_unused_total", prefill="p0", outcome="late"), 1.0)


def test_what_a_p_that_pushes_cannot_hand_over_is_not_asked_of_it() -> None:
    """vLLM knows requests of the other APIs by ids of its own."""
    response = JsonBody.parse(b'{"model":"m","input":"x"}', RESPONSES)
    assert auto.prefill_body(response, speaking("nixl-push")) is None
    for protocol in ("", "nixl", "ascend-mooncake"):
        assert auto.prefill_body(response, speaking(protocol)) is not None


class PushesTest(Case):
    CONFIG: Mapping[str, Any] = {"public_paths": ["/v1/responses"]}
    CONNECTOR = AutoConnector

    async def test_d_serves_what_p_cannot_hand_over_and_nobody_is_blamed(self) -> None:
        for endpoint in self.router.registry:
            self.router.registry.speaks(endpoint, "nixl-push", True)
        forward = await self.route({"model": "m", "input": "x"}, "/v1/responses")
        self.assertIsNone(forward.prefill)
        self.assertEqual(forward.served, "local")
        self.assertEqual(self.leg.tried, [])
        self.assertEqual([each.outcome for each in forward.decision.prefill_attempts], ["not_split"])
        forward.release()
        self.assertIdle()
