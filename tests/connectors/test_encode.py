"""What encode instances get, and what of their answers P gets: word for word."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.connectors import LEGS
from vllm_pd_scheduler.connectors import NixlConnector, UnknownConnector
from vllm_pd_scheduler.connectors.encode import (
    MAX_HASHES,
    MAX_PARAMS_BYTES,
    encode_body,
    encode_connector,
    encoded,
    merged,
)
from vllm_pd_scheduler.models import ConnectorChoice
from vllm_pd_scheduler.request.api import APIS
from vllm_pd_scheduler.request.body import JsonBody
from vllm_pd_scheduler.request.json_text import finish
from vllm_pd_scheduler.request.media import media_items

IMAGE = '{ "type":"image_url", "image_url":{"url":"data:image/png;base64,AA\\u003d"} }'
SOURCE = '{"type":"image","source":{"type":"base64","media_type":"image/png","data":"AA"}}'
WHERE = {"peer_host": "10.0.0.3", "peer_port": 5601, "size_bytes": 4096, "nixl_agent_metadata_b64": "AA=="}


@pytest.mark.parametrize(
    ("path", "part", "client", "expected"),
    [
        (
            "/v1/chat/completions",
            IMAGE,
            "",
            '{"messages":[{"role":"user","content":[PART]}],"max_tokens":1,"stream":false}',
        ),
        (
            "/v1/chat/completions",
            IMAGE,
            '"model":"m","stream":true,"max_completion_tokens":99,"tools":[],'
            '"mm_processor_kwargs": {"a": NaN},"temperature":0,"n":4,'
            '"media_io_kwargs":{"video":{"fps":2}},"stop":["x"],',
            '{"model":"m","mm_processor_kwargs":{"a": NaN},"media_io_kwargs":{"video":{"fps":2}},'
            '"messages":[{"role":"user","content":[PART]}],"max_tokens":1,"stream":false}',
        ),
        (
            "/v1/messages",
            SOURCE,
            '"model":"m","system":"be brief","max_tokens":50,',
            '{"model":"m","messages":[{"role":"user","content":[PART]}],"max_tokens":1,"stream":false}',
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("text", ["What is this?", "x" * 40_000], ids=["short", "long"])
def test_what_e_gets(path: str, part: str, client: str, expected: str, text: str) -> None:
    parts = '{"type":"text","text":"' + text + '"},' + part
    raw = "{" + client + '"messages":[{"role":"user","content":[' + parts + "]}]}"
    body = JsonBody.parse(raw.encode(), APIS[path])
    (item,) = finish(media_items(body))
    assert encode_body(body, item.part).decode() == expected.replace("PART", part)


def answered(params: Any, **more: Any) -> bytes:
    return json.dumps({"id": "chatcmpl-1", "choices": [], **more, "ec_transfer_params": params}).encode()


def test_what_e_answers() -> None:
    raw = json.dumps(WHERE).encode()
    assert encoded("ec-nixl", answered({"h": WHERE, "é": {"num_encoder_tokens": 3}})) == {
        "h": raw,
        "é": b'{"num_encoder_tokens": 3}',
    }
    for answer in (answered(None), answered({"h": WHERE}), b'{"choices":[]}'):
        assert encoded("ec-example", answer) == {}


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"not json", b"[]", b"null", b"{}", b'{"choices":[]}', b"\xff{}",
        answered(None), answered({}), answered([]), answered("h"), answered(7),
        answered({"h": None}), answered({"h": "x"}), answered({"h": 3}), answered({"h": []}),
        answered({"": WHERE}),
        answered({"h": {**WHERE, "size_bytes": "many"}}), answered({"h": {**WHERE, "size_bytes": -1}}),
        answered({"h": {**WHERE, "peer_port": 0}}), answered({"h": {**WHERE, "peer_host": 7}}),
        answered({"h": WHERE, "other": 7}),
        answered({str(number): WHERE for number in range(MAX_HASHES + 1)}),
        b'{"ec_transfer_params":{"h":{"x":"\xff"}}}',
        b'{"ec_transfer_params":{"h":{"x":' + b"[" * 99 + b"]" * 99 + b"}}}",
        b'{"ec_transfer_params":{"h":{"x":' + b"[" * 5000 + b"]" * 5000 + b"}}}",
    ],
)  # fmt: skip
def test_an_answer_that_makes_no_sense(answer: bytes) -> None:
    assert encoded("ec-nixl", answer) is None


def test_an_answer_that_is_no_answer() -> None:
    for answer in (b"", b"not json", b"[]", b"\xff"):
        assert encoded("ec-example", answer) is None


def test_all_items_make_one_field() -> None:
    assert merged([]) == b""
    assert merged([{}, {}]) == b""
    assert merged([{"a": b'{"x": 1}'}, {}, {"b": b"{}", 'c"': b"{}"}]) == b'{"a":{"x": 1},"b":{},"c\\"":{}}'
    assert merged([{"a": b'{"x": 1}'}, {"a": b'{"x": 1}'}]) == b'{"a":{"x": 1}}'


def test_what_is_disputed_is_left_out() -> None:
    one, two = {"a": b'{"x": 1}', "b": b"{}"}, {"a": b'{"x": 2}'}
    assert merged([one, two]) == b'{"b":{}}'
    assert merged([two, one, two]) == b'{"b":{}}'
    assert merged([{"a": b"1"}, {"a": b"2"}, {"a": b"1"}]) == b""


def test_too_much_is_not_sent() -> None:
    assert merged([{"a": b'"%s"' % (b"x" * MAX_PARAMS_BYTES)}]) == b""


def test_p_gets_it_with_whatever_its_connector_sends() -> None:
    raw = b'{"model":"m","messages":[],"max_tokens":9}'
    body = JsonBody.parse(raw)
    more = JsonBody(body.raw, body.fields, api=body.api, more={"ec_transfer_params": b'{"h":{}}'})
    sent = json.loads(NixlConnector().prefill_body(more, LEGS))
    assert sent.pop("ec_transfer_params") == {"h": {}}
    assert sent == json.loads(NixlConnector().prefill_body(body, LEGS))


def test_the_connector_of_an_instance() -> None:
    assert encode_connector(ConnectorChoice("ec-example")) == "ec-example"
    for wrong in (ConnectorChoice("nixl"), ConnectorChoice("ec-nixl", (("x", 1),))):
        with pytest.raises(UnknownConnector, match="ec-nixl, ec-example"):
            encode_connector(wrong)
