"""vllm-ascend's layer-wise connector: what D and P get, and which calls of D are its own."""

import json
import math
from typing import Any

import pytest

from vllm_pd_scheduler.connectors import AscendLayerwiseConnector, Legs, Order, Peer, Settings
from vllm_pd_scheduler.request.api import CHAT, MESSAGES, RESPONSES
from vllm_pd_scheduler.request.body import JsonBody

layerwise = AscendLayerwiseConnector()
LEGS = Legs("run-7", Peer("p0", "10.0.0.1", 8000, Settings()))
URL = "http://10.0.0.5:9005/v1/metaserver/abc"
CALL: dict[str, Any] = {
    "token_ids": [],
    "request_id": "cmpl-run-7-layerwise-0",
    "do_remote_prefill": False,
    "do_remote_decode": True,
    "remote_block_ids": [[1, 2, 3]],
    "remote_block_size": [128],
    "remote_engine_id": "e",
    "remote_host": "10.0.0.2",
    "remote_port": 30100,
    "remote_tp_size": 8,
    "remote_pcp_size": 1,
    "remote_dcp_size": 1,
    "remote_cached_tokens": 256,
}


def asked(**changed: Any) -> Any:
    return layerwise.asked(json.dumps({**CALL, **changed}).encode(), LEGS)


def test_d_begins() -> None:
    assert layerwise.order(LEGS.prefill) is Order.DECODE_FIRST


def test_what_d_gets() -> None:
    body = JsonBody.parse(b'{"prompt":"x","max_tokens":9}')
    found = layerwise.invitation(LEGS, URL)
    assert (found.lease, found.pinned) == (math.inf, False)
    assert found.headers == {"x-request-id": "run-7-layerwise"}
    splice = layerwise.splice(body, found)
    assert splice is not None
    assert json.loads(splice.into(body.raw)) == {
        "prompt": "x",
        "max_tokens": 9,
        "kv_transfer_params": {"do_remote_decode": False, "do_remote_prefill": True, "metaserver": URL},
    }


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_what_p_gets(limit: str) -> None:
    """Both proxies of vllm-ascend ask for a token that is no end."""
    asks = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    more = {
        limit: 9,
        "stream": True,
        "stream_options": {"include_usage": True},
        "stop": ["a"],
        "min_tokens": 4,
    }
    body = JsonBody.parse(json.dumps({**asks, **more}).encode(), CHAT)
    known = asked()
    legs = Legs(LEGS.id, LEGS.prefill, known)
    sent = json.loads(layerwise.prefill_body(body, legs))
    assert sent.pop(limit) == 1
    assert sent.pop("max_tokens", 1) == 1
    assert sent == {**asks, "stream": False, "min_tokens": 1, "kv_transfer_params": CALL}
    assert layerwise.prefill_headers(legs) == {"x-request-id": "run-7-layerwise"}


@pytest.mark.parametrize("request_id", ["cmpl-run-7-layerwise-0", "chatcmpl-run-7-layerwise"])
def test_a_call_goes_to_p_as_it_is(request_id: str) -> None:
    assert json.loads(asked(request_id=request_id, new_key=[1])) == {
        **CALL,
        "request_id": request_id,
        "new_key": [1],
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"request_id": "cmpl-run-77-layerwise-0"},
        {"request_id": 7},
        {"do_remote_decode": False},
        {"remote_host": ""},
        {"remote_port": 0},
        {"remote_port": "30100"},
        {"remote_cached_tokens": -1},
        {"remote_cached_tokens": None},
        {"remote_engine_id": None},
    ],
)
def test_calls_that_p_would_not_survive(wrong: dict[str, Any]) -> None:
    assert asked(**wrong) is None


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b'{"request_id":"\xff"}', b"[" * 10_000])
def test_calls_that_are_none(text: bytes) -> None:
    assert layerwise.asked(text, LEGS) is None


def test_a_call_that_is_too_deep_for_an_engine() -> None:
    text = json.dumps(CALL)[:-1] + ', "x": ' + "[" * 100 + "]" * 100 + "}"
    assert layerwise.asked(text.encode(), LEGS) is None


def test_a_p_that_has_answered_has_written() -> None:
    """Also after a first token that ends the text; it keeps nothing."""
    usage = {"prompt_tokens": 283, "prompt_tokens_details": {"cached_tokens": 16}}
    for reason in ("stop", "length"):
        answer = {"choices": [{"index": 0, "text": "", "finish_reason": reason}], "usage": usage}
        found = layerwise.handoff(json.dumps({**answer, "kv_transfer_params": None}).encode(), LEGS)
        assert found is not None
        assert (found.prompt_tokens, found.cached_tokens, found.pinned) == (283, 16, False)


def test_apis_whose_ids_are_not_made_of_a_header_are_not_split() -> None:
    assert layerwise.can_split(JsonBody.parse(b'{"prompt":"x"}'))
    assert not layerwise.can_split(JsonBody.parse(b'{"prompt":["x","y"]}'))
    assert not layerwise.can_split(JsonBody.parse(b'{"input":"x"}', RESPONSES))
    assert not layerwise.can_split(JsonBody.parse(b'{"messages":[],"max_tokens":1}', MESSAGES))
