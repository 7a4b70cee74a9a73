"""Where images, video and audio stand in a body."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vllm_pd_scheduler.request.api import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Api
from vllm_pd_scheduler.request.body import JsonBody
from vllm_pd_scheduler.request.json_text import AT_ONCE_BYTES, finish
from vllm_pd_scheduler.request.media import MAX_ITEMS, media_items

IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
OTHER = {"type": "image_url", "image_url": {"url": "https://example.com/b.png"}}
TEXT = {"type": "text", "text": "image_url, input_audio"}


def found(body: Any, api: Api = CHAT) -> list[str]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    items = finish(media_items(JsonBody.parse(raw, api)))
    assert len({item.key for item in items}) == len(items)
    return [item.part.copy().decode() for item in items]


def within(parts: str) -> bytes:
    """A body with parts as they are written."""
    return ('{"messages":[{"content":"x","role":"user","content":[' + parts + "]}]}").encode()


def chat(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(
    "part",
    [
        IMAGE,
        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
        {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,AAAA"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"image_url": {"url": 'with \\" and [{'}, "uuid": "x", "type": "image_url"},
    ],
)
def test_each_kind(part: dict[str, Any]) -> None:
    assert found(chat(TEXT, part, TEXT)) == [json.dumps(part)]


def test_all_messages_in_order_and_each_item_once() -> None:
    body = chat(IMAGE, TEXT, OTHER)
    body["messages"] += [{"role": "assistant", "content": "an image"}, *chat(IMAGE, OTHER)["messages"]]
    assert found(body) == [json.dumps(IMAGE), json.dumps(OTHER)]


def test_anthropic() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    assert found(chat(TEXT, image, IMAGE), MESSAGES) == [json.dumps(image)]
    assert found(chat(TEXT, image)) == []


@pytest.mark.parametrize("size", [10, AT_ONCE_BYTES, 1 << 20])
def test_the_bytes_are_the_clients(size: int) -> None:
    part = '{ "type" :"image_url",\n "image_url":{"url":"' + "A" * size + '\\u00e9"} }'
    assert found(within(part + ',{"type":"text","text":"x"}')) == [part]


@pytest.mark.parametrize(
    "body",
    [
        {"messages": "image_url"},
        {"messages": []},
        {"messages": [IMAGE, 7, None, "image_url", {"content": IMAGE}, {"content": None}]},
        {"messages": [{"content": [7, None, [IMAGE], {"type": ["image_url"]}, {"type": "a" * 99}]}]},
        {"messages": [{"content": "data:image_url"}], "x": [IMAGE]},
        chat({"image_url": {"url": "u"}}),
        chat(TEXT),
        {"input": [IMAGE]},
    ],
)
def test_none(body: Any) -> None:
    assert found(body) == []


def test_of_doubled_keys_the_last_counts() -> None:
    part = '{"type":"text","type":"image_url","image_url":{"url":"u"}}'
    assert found(within(part)) == [part]
    other = '{"type":"image_url","type":"text","image_url":{"url":"u"}}'
    assert found(within(other)) == []


def test_other_apis_have_none() -> None:
    assert found({"prompt": "x", "messages": [{"content": [IMAGE]}]}, COMPLETIONS) == []
    assert found({"input": [{"content": [IMAGE]}], **chat(IMAGE)}, RESPONSES) == []


def test_malformed_messages_have_none() -> None:
    """They are split by their brackets alone when they are long."""
    part = json.dumps(IMAGE)
    assert found(within(f'{part}, nonsense, "{"A" * AT_ONCE_BYTES}"')) == []


def test_there_is_a_limit() -> None:
    many = [{"type": "image_url", "image_url": {"url": f"u{number}"}} for number in range(2 * MAX_ITEMS)]
    assert len(found(chat(*many))) == MAX_ITEMS
    texts = [{"type": "text", "text": str(number)} for number in range(20_000)]
    assert found(chat(*texts, IMAGE)) == []


def test_a_long_body_is_read_in_many_steps() -> None:
    url = "data:image/png;base64," + "A" * (4 << 20)
    body = JsonBody.parse(json.dumps(chat({"type": "image_url", "image_url": {"url": url}})).encode(), CHAT)
    assert sum(1 for _ in media_items(body)) > 100
