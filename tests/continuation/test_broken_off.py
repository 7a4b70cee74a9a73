"""An answer that breaks off after any of its bytes: the rest is right, or the stream is cut."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_pd_scheduler.continuation.answer import Ingress
from vllm_pd_scheduler.continuation.asked import CHAT, COMPLETIONS
from vllm_pd_scheduler.continuation.envoy_side import Connection
from vllm_pd_scheduler.continuation.server import Continuation, Outcome
from vllm_pd_scheduler.routing.going_on import GoingOn
from vllm_pd_scheduler.routing.lost import LostPrompts

PROMPT = [1, 2]
WORDS = 'Grüße 😀, "error" ,"token_ids":[1] ≠ \\u00e9 €.'.encode()
SIZES = [1, 2, 1, 3, 1, 1, 2]
STEP = 31
"""Every so many bytes one is cut."""
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def answer_tokens() -> list[bytes]:
    """Split the answer without regard to characters, as a tokenizer of bytes does."""
    tokens, at = list[bytes](), 0
    while at < len(WORDS):
        size = SIZES[len(tokens) % len(SIZES)]
        tokens.append(WORDS[at : at + size])
        at += size
    return tokens


TOKENS = answer_tokens()
IDS = list(range(100, 100 + len(TOKENS)))


def text_of(ids: list[int]) -> str:
    return b"".join(TOKENS[each - 100] for each in ids).decode(errors="replace")


@dataclass
class Engine:
    """Answers as vLLM does. ``cuts``: after how many bytes of its body each stream breaks off."""

    group: int = 1
    cuts: list[int | None] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    says: list[dict[str, Any]] = field(default_factory=list)
    """Choices, one an event, after which it breaks off."""
    told: bytes = b""
    """Its answer to questions; empty: the right one."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            path = head.split(b" ")[1].decode()
            body = json.loads(await reader.readexactly(size)) if size else {}
            await self.answer(path, body, writer)
            await writer.drain()
        writer.close()

    async def answer(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if path in ("/detokenize", "/v1/models"):
            said = self.told or json.dumps({"prompt": text_of(body["tokens"])}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(said), said))
            return
        self.bodies.append(body)
        said = b"".join(self.events(path, body))
        cut = self.cuts.pop(0) if self.cuts else None
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-pd-decode: d\r\n")
        writer.write(b"transfer-encoding: chunked\r\n\r\n")
        if self.says:
            made = [{"id": "a", "choices": [each]} for each in self.says]
            said, cut = b"".join(b"data: %b\n\n" % json.dumps(each).encode() for each in made), 1 << 20
        kept = said[:cut]
        if kept:
            writer.write(b"%x\r\n%b\r\n" % (len(kept), kept))
        if cut is None:
            writer.write(b"0\r\n\r\n")

    def events(self, path: str, body: dict[str, Any]) -> list[bytes]:
        goes_on = path == COMPLETIONS and isinstance(body["prompt"], list)
        prompt = body["prompt"] if goes_on else PROMPT
        done = prompt[len(PROMPT) :]
        assert prompt[: len(PROMPT)] == PROMPT
        assert done == IDS[: len(done)], "those that the answer has"
        left = IDS[len(done) :][: body.get("max_tokens")]
        shows, head = body.get("return_token_ids"), {"id": f"a{len(self.bodies)}", "created": 1, "model": "m"}
        usage = {"prompt_tokens": len(prompt), "total_tokens": 0, "completion_tokens": 0}
        options = body.get("stream_options") or {}
        found = list[bytes]()

        def event(choices: list[dict[str, Any]], ids: bool = False, use: bool = False) -> None:
            said = {**head, "choices": choices}
            if ids and path == CHAT:
                said["prompt_token_ids"] = prompt
            if use or options.get("continuous_usage_stats"):
                said["usage"] = usage
            found.append(b"data: " + json.dumps(said, separators=(",", ":")).encode() + b"\n\n")

        if path == CHAT:
            event([{"index": 0, "delta": {"role": "assistant", "content": ""}}], ids=bool(shows))
        shown, sent = 0, list[int]()
        for at in range(0, len(left), self.group):
            ids = left[at : at + self.group]
            new = ""
            for each in ids:
                sent.append(each)
                text = text_of(sent)
                if not text.endswith(UNKNOWN):  # else vLLM holds it back
                    new, shown = new + text[shown:], len(text)
            usage = {
                "prompt_tokens": len(prompt),
                "total_tokens": len(prompt) + len(sent),
                "completion_tokens": len(sent),
            }
            ends = ("stop" if sent[-1] == IDS[-1] else "length") if sent == left else None
            said: dict[str, Any] = {"delta": {"content": new}} if path == CHAT else {"text": new}
            if shows:
                said["token_ids"] = ids
                if path != CHAT and not at:
                    said["prompt_token_ids"] = prompt
            event([{"index": 0, **said, "finish_reason": ends}])
        if options.get("include_usage"):
            event([], use=True)
        return [*found, b"data: [DONE]\n\n"]


@dataclass
class Case:
    engine: Engine
    ingress: str
    port: int
    ended: list[Outcome]

    async def ask(self, path: str, body: dict[str, Any]) -> tuple[bytes, bool]:
        """Return the answer's body, and whether it came whole."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        said = json.dumps(body).encode()
        writer.write(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n" % (path.encode(), len(said)))
        writer.write(b"x-pd-continue: true\r\nconnection: close\r\n\r\n" + said)
        raw = b""
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                raw += data
        writer.close()
        _, _, rest = raw.partition(b"\r\n\r\n")
        found = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            if size == b"0":
                return found, True
            found, rest = found + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        return found, False


@contextlib.asynccontextmanager
async def case(engine: Engine) -> AsyncIterator[Case]:
    ended = list[Outcome]()
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
    ingress = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    going_on = GoingOn(LostPrompts(), asyncio.get_running_loop().time)
    continuation = Continuation(ingress, going_on, lambda how, *_: ended.append(how))
    await continuation.start(0)
    assert continuation._server is not None
    yield Case(engine, ingress, continuation._server.sockets[0].getsockname()[1], ended)
    await continuation.stop()
    server.close()


def request(path: str, **more: Any) -> dict[str, Any]:
    asked = {"prompt": "Hi"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "Hi"}]}
    return {**asked, "stream": True, "max_tokens": 60, "stream_options": {"include_usage": True}, **more}


def read(raw: bytes) -> tuple[str, list[dict[str, Any]], list[str], list[int]]:
    """Return the text, the usage, the finish reasons, and the token ids of an answer."""
    parts = raw.split(b"\n\n")
    assert parts[-1] == b"", "whole events alone"
    events = [json.loads(each[6:]) for each in parts[:-1] if each != b"data: [DONE]"]
    assert raw.count(b"[DONE]") <= 1
    choices = [choice for each in events for choice in each["choices"]]
    text = "".join(each["delta"].get("content", "") if "delta" in each else each["text"] for each in choices)
    usage = [each["usage"] for each in events if each.get("usage") and not each["choices"]]
    ids = [token for each in choices for token in each.get("token_ids") or ()]
    return text, usage, [each["finish_reason"] for each in choices if each.get("finish_reason")], ids


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(
    ("path", "more"),
    [
        (CHAT, {}),
        (COMPLETIONS, {}),
        (CHAT, {"max_tokens": 1}),
        (CHAT, {"stream_options": None}),
        (COMPLETIONS, {"return_token_ids": True, "max_tokens": 9}),
        (CHAT, {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}),
    ],
)
async def test_it_is_whole_after_any_byte(path: str, more: dict[str, Any], group: int) -> None:
    async with case(Engine(group)) as found:
        raw, _ = await found.ask(path, request(path, **more))
        whole = read(raw)
        size = len(b"".join(found.engine.events(path, {**request(path, **more), "return_token_ids": True})))
        for cut in range(0, size, STEP):
            found.engine.cuts = [cut]
            raw, is_whole = await found.ask(path, request(path, **more))
            text, usage, finish, ids = read(raw)
            if is_whole:
                assert (text, usage, finish, ids) == whole, cut
                assert raw.count(b"[DONE]") == 1
            else:  # it has shown the id of a token whose text was held back
                assert more.get("return_token_ids"), cut
                assert whole[0].startswith(text)
            assert b"prompt_token_ids" not in raw or "return_token_ids" in more


async def test_an_answer_of_which_the_tokens_are_not_known_has_no_made_up_usage() -> None:
    """All has come but the usage: of thoughts, say, nobody has counted the tokens."""
    async with case(Engine()) as found:
        thoughts = {"index": 0, "delta": {"reasoning": "hm"}, "finish_reason": None, "token_ids": [100]}
        last = {"index": 0, "delta": {"content": "a"}, "finish_reason": "stop", "token_ids": [101]}
        found.engine.says = [thoughts, last]
        raw, is_whole = await found.ask(CHAT, request(CHAT))
        assert b"usage" not in raw
        assert not is_whole
        raw, is_whole = await found.ask(CHAT, request(CHAT, stream_options=None))
        assert is_whole
    assert found.ended == [Outcome.IMPOSSIBLE, Outcome.CONTINUED]


async def test_what_a_second_engine_says_waits_for_a_slow_client_too() -> None:
    """The first one has said that it failed while the client read nothing."""
    heard = list[str]()
    source = SimpleNamespace(pause=lambda: heard.append("pause"), resume=lambda: heard.append("resume"))
    reply = Connection(_nothing, set())
    reply.pause_writing()
    reply.take_from(source)
    assert heard == ["pause"]
    reply.resume_writing()
    assert heard == ["pause", "resume"]
    reply.take_from(source)
    assert heard == ["pause", "resume"]


async def test_an_answer_that_is_not_wanted_yet_is_not_read() -> None:
    async with case(Engine()) as found:
        body = json.dumps(request(CHAT)).encode()
        async with await Ingress(found.ingress).ask(b"POST", CHAT.encode(), [], body) as answer:
            answer.pause()
            reading = asyncio.ensure_future(answer.pass_to(lambda _: None))
            await asyncio.sleep(0)
            assert not answer._transport.is_reading()
            answer.resume()
            await reading


async def _nothing(*_: Any) -> None: ...


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(
    "told",
    [
        b"[" * 100_000,
        b'{"data":' + b"[" * 100_000,
        b"\xff",
        b'{"data":7}',
        b'{"data":["x"]}',
        b'{"prompt":[1]}',
        b"{}",
    ],
)
async def test_questions_that_are_answered_with_nonsense(
    told: bytes, group: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Of ``group`` tokens an event one asks for their text, and without a limit for the model's."""
    async with case(Engine(group, told=told)) as found:
        body = request(CHAT)
        if group == 1:
            del body["max_tokens"]
        events = found.engine.events(CHAT, {**body, "return_token_ids": True})
        found.engine.cuts = [len(b"".join(events[:3]))]
        _, is_whole = await found.ask(CHAT, body)
        assert not is_whole
    assert found.ended == [Outcome.IMPOSSIBLE]
    assert not caplog.records
