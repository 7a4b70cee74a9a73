"""NIXL that pushes: one request id of their own for both legs, and what D's engine reads without a check."""

import json
import re
from typing import Any

import pytest
from msgspec.structs import replace

from tests.connectors.test_nixl import ANSWER, PARAMS, TEXT, body
from tests.support.connectors import LEGS
from vllm_pd_scheduler.connectors import Handoff, NixlPushConnector
from vllm_pd_scheduler.request.api import APIS, CHAT, COMPLETIONS
from vllm_pd_scheduler.request.body import JsonBody

push = NixlPushConnector()

# As vLLM 0.32 and 0.33 answer, key for key.
PUSHED: dict[str, Any] = {key: value for key, value in PARAMS.items() if key != "remote_blocks_expiry_time"}
PUSHED.pop("remote_registration_generation")
PUSHED |= {"transfer_mode": "push", "remote_request_id": "cmpl-run-0-push-0-1a2b3c4d"}


def handoff(params: Any) -> Handoff | None:
    return push.handoff(json.dumps({**ANSWER, "kv_transfer_params": params}).encode(), LEGS)


def test_both_legs_have_the_same_id_which_no_other_attempt_has() -> None:
    found = handoff(PUSHED)
    assert found is not None
    assert found.headers == push.prefill_headers(LEGS) == {"x-request-id": "run-0-push"}
    assert push.prefill_headers(replace(LEGS, id="run-1")) != found.headers


def test_vllm_tells_attempts_apart_without_the_digits_at_the_end() -> None:
    """It cuts off 8 hex digits, its own or what it takes for them."""
    ids = [push.prefill_headers(replace(LEGS, id=f"run-{10_000_000 + n}"))["x-request-id"] for n in range(9)]
    assert len({re.sub(r"-[0-9a-f]{8}$", "", f"chatcmpl-{each}", flags=re.I) for each in ids}) == 9


def test_the_bodies_are_those_of_nixl() -> None:
    sent = json.loads(push.prefill_body(body(TEXT), LEGS))
    assert sent["kv_transfer_params"]["do_remote_decode"] is True
    assert sent["max_tokens"] == 1
    request, found = body(TEXT), handoff(PUSHED)
    assert found is not None
    assert json.loads(push.splice(request, found).into(request.raw)) == {**TEXT, "kv_transfer_params": PUSHED}


@pytest.mark.parametrize("key", ["tp_size", "remote_engine_id", "remote_host", "remote_port"])
def test_without_what_d_needs_there_is_no_hand_off(key: str) -> None:
    """D's engine would die of a KeyError."""
    assert handoff({name: value for name, value in PUSHED.items() if name != key}) is None
    assert handoff(PUSHED | {key: None}) is None


@pytest.mark.parametrize("mode", ["pull", "READ"])
def test_a_p_that_does_not_push_is_another_connectors(mode: str) -> None:
    with pytest.raises(ValueError, match="this is not its connector"):
        handoff(PUSHED | {"transfer_mode": mode})


@pytest.mark.parametrize(
    "known_as", ["cmpl-of-the-client-0-1a2b3c4d", "resp_7", "cmpl-run-1-push-0-1a2b3c4d"]
)
def test_what_p_knows_by_another_id_is_not_used(known_as: str) -> None:
    found = handoff(PUSHED | {"remote_request_id": known_as})
    assert found is not None
    assert not found.pinned
    assert found.lease is not None
    assert 0 < found.lease < 1e-6


def test_requests_that_vllm_does_not_know_by_their_header_are_not_split() -> None:
    raw = json.dumps({"model": "m", "input": "x", "token_ids": [1], "sampling_params": {}}).encode()
    for api in APIS.values():
        request = JsonBody.parse(raw, api)
        assert push.can_split(request) is (api in (CHAT, COMPLETIONS)), api.path


def test_it_is_given_back_by_a_request_that_d_serves() -> None:
    found = handoff(PUSHED)
    assert found is not None
    assert (found.release_path, found.released_by) == ("/v1/completions", 200)
    sent = json.loads(push.release_body(found, "m"))
    assert sent == {"model": "m", "prompt": "x", "max_tokens": 1, "kv_transfer_params": PUSHED}


def test_a_chat_is_given_back_as_a_chat() -> None:
    """P knows the request by an id that begins with the kind of its path."""
    found = handoff(PUSHED | {"remote_request_id": "chatcmpl-run-0-push-1a2b3c4d"})
    assert found is not None
    assert found.release_path == "/v1/chat/completions"
    assert json.loads(push.release_body(found, None))["messages"] == [{"role": "user", "content": "x"}]


def test_a_release_that_does_not_say_that_it_pushes() -> None:
    assert handoff({key: value for key, value in PUSHED.items() if key != "transfer_mode"}) is not None
