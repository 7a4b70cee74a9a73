"""Requests that nobody should send, made from valid ones; each is a function of seed and number alone."""

# ruff: noqa: SIM905 - lists of words are easier to read as words

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

HANDOFF = "kv_transfer_params"
EVIL = {"do_remote_prefill": True, "remote_engine_id": "evil", "remote_block_ids": [[1]], "remote_port": 1}
DEAD = {**EVIL, "remote_host": "127.0.0.1", "remote_request_id": "evil", "do_remote_decode": False}


class Text(str):
    """JSON text that is written as it is, valid or not."""


class Pairs(list[tuple[str, Any]]):
    """An object whose keys may stand twice."""


COMPLETION = {"prompt": "Where is the cache?", "max_tokens": 3}
CHAT = {"messages": [{"role": "user", "content": "Where is the cache?"}], "max_tokens": 3}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", COMPLETION),
    ("/v1/completions", {**COMPLETION, "stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/completions", {**COMPLETION, "n": 2}),
    ("/v1/completions", {**COMPLETION, "prompt": [1, 2, 3]}),
    ("/v1/completions", {**COMPLETION, "prompt": ["Where is the cache?"]}),
    ("/v1/completions", {**COMPLETION, "prompt": [[1, 2, 3]], "cache_salt": "s"}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "stream": True, "model": "sim-model", "max_completion_tokens": 2}),
    ("/v1/embeddings", {"input": "text"}),
    ("/tokenize", {"prompt": "text"}),
]

READ = (
    *("model", "prompt", "messages", "max_tokens", "max_completion_tokens", "min_tokens", "stream"),
    *("stream_options", "n", "best_of", "use_beam_search", "echo", "prompt_logprobs", "prompt_embeds"),
    *("temperature", "seed", "stop", "x_unknown", "", "\0", "é", HANDOFF),
)
"""Fields that the scheduler reads, and some that it does not."""

NUMBERS = [*"NaN -Infinity 1e999 -1e999 1e-999 1. 01 +1 -0 /**/1 tru".split(), "9" * 400, "-" + "9" * 5000]
STRINGS = ["'x'", '"\\x41"', '"\\ud800"', '"\\udc00\\ud800"', '"\t"', '"\\u00"']
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 1.5, -0.0, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30),
    *("", "1", "x", " ", "\ud800", "a\udfffb", "\U0001f600", "\0", "\x7f", "\u2028", "x" * 5000, HANDOFF),
    *([], {}, [[]], [None], [1, "x"], [[1], [2]], [""], ["a", "b"], {"a": 1}, {"include_usage": 7}, {"": {}}),
    *([{"role": "user"}], [{"role": 1, "content": 2}], [{"role": "user", "content": [{"type": "text"}]}]),
    *(Text(text) for text in NUMBERS + STRINGS),
    *(Text("[" * n + "]" * n) for n in (20, 199, 201, 900, 5000)),
    *(Text('{"a":' * n + "1" + "}" * n) for n in (20, 198, 203, 990)),
    *(Text("[" * n) for n in (1, 300, 60_000)),
    *(EVIL, DEAD, {HANDOFF: EVIL}, [{HANDOFF: DEAD}], {"a": [{HANDOFF: None}]}),
]

METHODS = ["POST"] * 12 + "GET PUT PATCH DELETE HEAD OPTIONS TRACE FOO post CONNECT".split()
PATHS = """
    /v1/completions/ //v1/completions /v1/completions?a=b /v1/completions#x /v1/%63ompletions /V1/completions
    /v1/./completions /a/../v1/completions /v1/completions%00 /v1/completions;a /v1/completions?\x7f
    http://evil/v1/completions /v1/models / * /% /%ff%fe /\xff /metrics /health /version /load /v1/responses
""".split()
PATHS += ["/v1/completions?" + "a" * 5000, "/a" * 500]
TYPES = [
    *(
        "",
        "text/plain",
        "application/json; charset=utf-16",
        "application/JSON",
        "application/json\xff",
        "json",
    ),
    *("multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "a/b;;;="),
]
NAMES = """
    x-request-id traceparent tracestate authorization accept user-agent cookie x-a te content-encoding
    accept-encoding x-pd-id x-pd-prefill range x-gateway-destination-endpoint
    x-envoy-attempt-count x-envoy-max-retries x-forwarded-for via grpc-timeout upgrade connection
    x-http-method-override trailer if-none-match forwarded
""".split()
WORDS = ["", *"1 steer 127.0.0.1:1 -1 100-continue websocket gzip".split(), "9" * 30]


@dataclass(frozen=True, slots=True)
class Request:
    """One request as bytes; ``method`` says how its answer is framed."""

    method: str
    data: bytes


def request(seed: int, number: int) -> Request:
    """Return the request of this number."""
    chance = random.Random(f"{seed}/{number}")
    path, fields = chance.choice(BODIES)
    document: Any = dict(fields)
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
        document = chance.choice(CHANGES)(chance, document)
    body = write(chance, document).encode("utf-8", "surrogatepass")
    headers = [("content-type", "application/json")]
    if chance.random() < 0.2:
        body = chance.choice(DAMAGES)(chance, body)
    if chance.random() < 0.15:
        headers = [("content-type", chance.choice(TYPES))]
    if chance.random() < 0.03:
        headers.append(("expect", "100-continue"))  # the simulator refuses others; vLLM and Envoy let them be
    for name in chance.sample(NAMES, chance.choice((0, 0, 0, 1, 1, 2, 8))):
        headers.append((name, header_value(chance)))
    if chance.random() < 0.03:
        body = gzip.compress(body, mtime=0)
        headers.append(("content-encoding", "gzip"))
    method = chance.choice(METHODS) if chance.random() < 0.5 else "POST"
    if chance.random() < 0.15:
        path = chance.choice(PATHS)
    return Request(method, frame(chance, method, path, headers, body))


# -- changes of the document


def wrong_value(chance: random.Random, document: Any) -> Any:
    return {**_members(document), chance.choice(READ): chance.choice(VALUES)}


def without_one(chance: random.Random, document: Any) -> Any:
    members = _members(document)
    if members:
        del members[chance.choice(list(members))]
    return members


def twice(chance: random.Random, document: Any) -> Any:
    pairs = Pairs(_members(document).items())
    name = chance.choice([key for key, _ in pairs] or ["a"])
    pairs.insert(chance.randint(0, len(pairs)), (name, chance.choice(VALUES)))
    return pairs


def hand_off(chance: random.Random, document: Any) -> Any:
    """A hand-off of the client's own: at the top, inside, twice, or hidden in what is deeper."""
    made = chance.choice((EVIL, DEAD, {}, None, {"do_remote_prefill": True}, {"do_remote_decode": True}))
    inside: Any = {HANDOFF: made}
    for _ in range(chance.choice((0, 1, 3, 150))):
        inside = [inside] if chance.random() < 0.5 else {chance.choice(("a", HANDOFF)): inside}
    pairs = Pairs(_members(document).items())
    for name, value in ((HANDOFF, made), ("x", inside), (HANDOFF, inside)):
        if chance.random() < 0.5:
            pairs.insert(chance.randint(0, len(pairs)), (name, value))
    return pairs


def long(chance: random.Random, document: Any) -> Any:
    """A field so long that the body is read in steps."""
    unit = chance.choice(('"x",', "[],", '{"a":"\\\\"},', "NaN,", "1,", '"kv_transfer_params",', '"\\"]",'))
    made: Any = Text("[" + unit * chance.choice((8_000, 20_000)) + "0]")
    if chance.random() < 0.3:
        made = "word " * chance.choice((8_000, 20_000))
    pairs = Pairs(_members(document).items())
    name = chance.choice(("x", "x", "prompt", "messages", "tools", "stream", "model"))
    pairs.insert(chance.randint(0, len(pairs)), (name, made))
    return pairs


def many(chance: random.Random, document: Any) -> Any:
    names = [f"x{number}" for number in range(chance.choice((100, 4_000, 5_000)))]
    return {**dict.fromkeys(names, 0), **_members(document)}


def no_object(chance: random.Random, document: Any) -> Any:
    return chance.choice(([document], [], None, "x", 1, Text(""), Text("{}{}"), Text("{} x"), Text("{,}")))


CHANGES: tuple[Callable[[random.Random, Any], Any], ...] = (
    *(wrong_value,) * 6,
    *(hand_off,) * 3,
    long,
    many,
    twice,
    without_one,
    no_object,
)


def _members(document: Any) -> dict[str, Any]:
    return dict(document) if isinstance(document, dict | Pairs) else {}


def write(chance: random.Random, value: Any) -> str:
    """JSON text with odd spacing and spellings."""
    space = chance.choice(("", "", "", " ", "\r\n\t "))
    if isinstance(value, Text):
        return value
    if isinstance(value, dict | Pairs):
        pairs = value if isinstance(value, Pairs) else value.items()
        members = (f"{spell(chance, key)}{space}:{space}{write(chance, item)}" for key, item in pairs)
        return "{" + space + f"{space},".join(members) + "}"
    if isinstance(value, list):
        return "[" + f",{space}".join(write(chance, item) for item in value) + space + "]"
    return spell(chance, value) if isinstance(value, str) else json.dumps(value)


def spell(chance: random.Random, text: str) -> str:
    """A string with some of its letters as escapes."""
    if chance.random() < 0.7 or len(text) > 100:
        return json.dumps(text, ensure_ascii=chance.random() < 0.5)
    return '"' + "".join(_letter(chance, letter) for letter in text) + '"'


def _letter(chance: random.Random, letter: str) -> str:
    if ord(letter) < 0x10000 and chance.random() < 0.5:
        return f"\\u{ord(letter):04{chance.choice('xX')}}"
    return json.dumps(letter)[1:-1]


# -- damage to the bytes


def cut(chance: random.Random, body: bytes) -> bytes:
    return body[: chance.randint(0, len(body))]


def flip(chance: random.Random, body: bytes) -> bytes:
    data = bytearray(body or b"x")
    for _ in range(chance.choice((1, 1, 4))):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data)


def insert(chance: random.Random, body: bytes) -> bytes:
    junk = chance.choice(
        (b"\0", b"\xff", b"\xed\xa0\x80", b"\xc0\xaf", b'"', b"\\", b"}", b",", b"\x1f", b"\xf4\x90")
    )
    at = chance.randint(0, len(body))
    return body[:at] + junk * chance.choice((1, 1, 3)) + body[at:]


def encode(chance: random.Random, body: bytes) -> bytes:
    text = body.decode("utf-8", "replace")
    return text.encode(
        chance.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-7", "cp037")), "replace"
    )


def pad(chance: random.Random, body: bytes) -> bytes:
    junk = chance.choice((b" ", b"\n", b"\0", b"x", b"\xef\xbb\xbf")) * chance.choice((1, 3, 70_000))
    return junk + body if chance.random() < 0.5 else body + junk


def noise(chance: random.Random, body: bytes) -> bytes:
    return chance.randbytes(chance.choice((0, 1, 50, 5000)))


DAMAGES: tuple[Callable[[random.Random, bytes], bytes], ...] = (cut, flip, insert, encode, pad, noise)


# -- headers and framing


def header_value(chance: random.Random) -> str:
    """What RFC 9110 lets a value hold, in Latin-1, and seldom what it does not."""
    kind = chance.randrange(10)
    if kind < 3:
        return chance.choice(WORDS)
    if kind < 9:
        letters = "\t !\"#%&'()*+,-./:;<=>?@[\\]^_`{|}~" + "".join(map(chr, range(0x80, 0x100)))
        return "".join(chance.choices(letters + "abcXYZ019", k=chance.choice((1, 5, 40, 3000))))
    return "a" + chance.choice("\x00\x01\x0b\x1f\x7f\r\n") + "b"


def frame(
    chance: random.Random, method: str, path: str, headers: list[tuple[str, str]], body: bytes
) -> bytes:
    """Write the request; its body by length or in chunks."""
    lines = [f"{method} {path} HTTP/1.1", "host: fuzz", *(f"{name}: {value}" for name, value in headers)]
    if chance.random() < 0.2:
        lines.append("transfer-encoding: chunked")
        chunks = []
        while body:
            size = chance.choice((1, 7, 1000, 50_000)) if len(body) < 5_000 else 50_000
            chunks.append(b"%x\r\n%s\r\n" % (len(body[:size]), body[:size]))
            body = body[size:]
        body = b"".join(chunks) + b"0\r\n\r\n"
    else:
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
