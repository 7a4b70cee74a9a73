"""SGLang: the room that both legs get, what can be split, and what P's answer tells."""

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.support.connectors import LEGS
from vllm_pd_scheduler.connectors import Handoff, Order, Question, SglangConnector
from vllm_pd_scheduler.connectors.sglang import SglangSettings, room
from vllm_pd_scheduler.request.api import APIS, CHAT, COMPLETIONS, MESSAGES, NATIVE, RESPONSES, Api
from vllm_pd_scheduler.request.body import JsonBody

PEER = replace(LEGS.prefill, settings=SglangSettings(bootstrap_port=9001))
LEGS = replace(LEGS, prefill=PEER)
SGLANG = SglangConnector()
ROOM = {
    "bootstrap_host": "10.0.0.1",
    "bootstrap_port": 9001,
    "bootstrap_room": room(LEGS),
    "rid": "run-0-",
    "bootstrap_pair_key": None,
    "decode_tp_size": None,
    "routed_dp_rank": None,
    "data_parallel_rank": None,
    "disagg_prefill_dp_rank": None,
}


def parsed(body: dict[str, Any], api: Api = COMPLETIONS) -> JsonBody:
    return JsonBody.parse(json.dumps(body).encode(), api)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "x", "max_tokens": 9, "stop": ["a"], "min_tokens": 2},
        {"prompt": "x", "bootstrap_host": "evil", "bootstrap_room": 1, "rid": "mine", "routed_dp_rank": 3},
        {"prompt": "x" * 40_000, "bootstrap_room": 1},
    ],
    ids=["empty", "plain", "the client's own room", "long"],
)
def test_both_legs_get_the_clients_fields_and_the_same_room(body: dict[str, Any]) -> None:
    found = parsed(body)
    splice = SGLANG.splice(found, SGLANG.promised(LEGS))
    assert json.loads(splice.into(found.raw)) == {**body, **ROOM}
    assert json.loads(SGLANG.prefill_body(found, LEGS)) == {**body, "stream": False, **ROOM}


def test_the_bootstrap_server_is_asked_whether_it_is_there() -> None:
    assert SGLANG.question(PEER) == Question(9001, "/health"), "as D does"
    assert SGLANG.understood(b"OK", PEER)


def test_a_prefill_is_not_streamed() -> None:
    body = parsed({"prompt": "x", "stream": True, "stream_options": {"include_usage": True}})
    sent = json.loads(SGLANG.prefill_body(body, LEGS))
    assert sent["stream"] is False
    assert "stream_options" not in sent
    splice = SGLANG.splice(body, SGLANG.promised(LEGS))
    assert json.loads(splice.into(body.raw))["stream"] is True


def test_each_attempt_has_a_room_of_its_own() -> None:
    rooms = {room(replace(LEGS, id=f"run-{number}")) for number in range(10_000)}
    assert len(rooms) == 10_000
    assert all(0 < each < 1 << 63 for each in rooms)
    assert {each % 8 for each in rooms} == set(range(8)), "its remainder is P's rank"


def test_no_attempt_is_called_as_another_one_begins() -> None:
    """SGLang's scheduler aborts all requests whose id begins with the one that it is told."""
    names = [json.loads(SGLANG.abort(replace(LEGS, id=f"run-{n}")).body)["rid"] for n in range(120)]
    assert not [(a, b) for a in names for b in names if a is not b and b.startswith(a)]
    assert SGLANG.abort(LEGS).path == "/abort_request"


@pytest.mark.parametrize(
    ("api", "body", "expected"),
    [
        (COMPLETIONS, {"prompt": "x"}, True),
        (COMPLETIONS, {"prompt": ["x", "y"]}, True),
        (COMPLETIONS, {"prompt": "x", "n": 1, "logprobs": 5}, True),
        (COMPLETIONS, {"prompt": "x", "n": 2}, False),
        (COMPLETIONS, {"prompt": "x", "echo": True}, False),
        (COMPLETIONS, {"prompt": "x", "use_beam_search": True}, False),
        (CHAT, {"messages": [], "logprobs": True}, True),
        (CHAT, {"messages": [], "n": 3}, False),
        (NATIVE, {"text": "x"}, True),
        (NATIVE, {"text": ["x", "y"], "sampling_params": [{}, {"n": 1}]}, True),
        (NATIVE, {"text": ["x", "y"], "sampling_params": [{}, {"n": 2}]}, False),
        (NATIVE, {"input_ids": [1], "sampling_params": {"n": 2}}, False),
        (NATIVE, {"text": "x", "sampling_params": {"a": "y" * 5000}}, False),
        (NATIVE, {"text": "x", "return_logprob": True}, True),
        (NATIVE, {"text": "x", "logprob_start_len": -1}, True),
        (NATIVE, {"text": "x", "logprob_start_len": 0}, False),
        (RESPONSES, {"input": "x"}, False),
        (MESSAGES, {"messages": []}, False),
    ],
)
def test_what_can_be_split(api: Api, body: dict[str, Any], expected: bool) -> None:
    assert SGLANG.can_split(parsed(body, api)) is expected


@pytest.mark.parametrize(
    ("answer", "tokens", "cached"),
    [
        ({"usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}}, 9, 4),
        ({"usage": {"prompt_tokens": 9, "prompt_tokens_details": None}}, 9, None),
        ({"text": "a", "meta_info": {"prompt_tokens": 9, "cached_tokens": 4}}, 9, 4),
        ({"meta_info": {"prompt_tokens": 9, "cached_tokens": 40}}, 9, 9),
        ({"meta_info": {"prompt_tokens": "many"}}, None, None),
        ([{"text": "a"}], None, None),
        ({}, None, None),
    ],
)
def test_what_p_has_counted(answer: Any, tokens: int | None, cached: int | None) -> None:
    """There is nothing else in its answer: D has the blocks by then."""
    found = SGLANG.handoff(json.dumps(answer).encode(), LEGS)
    assert found is not None
    assert (found.prompt_tokens, found.cached_tokens, found.pinned) == (tokens, cached, False)


def test_its_nature() -> None:
    assert SGLANG.order(PEER) is Order.TOGETHER
    assert SGLANG.needs_prefill
    assert SGLANG.promised(LEGS).lease == 300.0
    assert SGLANG.release_body(Handoff(b""), "m") is None
    assert set(APIS) >= {"/generate"}
