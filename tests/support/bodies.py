"""Request bodies that are cheap to send and dear to read, of any size."""

from __future__ import annotations

from collections.abc import Callable


def _filled(head: bytes, unit: bytes, tail: bytes) -> Callable[[int], bytes]:
    return lambda size: head + unit * ((size - len(head) - len(tail)) // len(unit)) + tail


def _fields(size: int) -> bytes:
    return b"{" + b",".join([b'"%06x":0' % number for number in range(size // 11)]) + b"}"


_USER = b'{"messages":[{"role":"user","content":'

HARMLESS: dict[str, Callable[[int], bytes]] = {
    "text": _filled(b'{"prompt":"', b"word ", b'"}'),
    "text in a list": _filled(b'{"prompt":["', b"word ", b'"]}'),
    "wide text": _filled('{"prompt":"\U0001f600'.encode(), b"word ", b'"}'),
    "BOM": _filled(b'\xef\xbb\xbf{"prompt":"', b"word ", b'"}'),
    "image": _filled(_USER + b'[{"type":"image_url","image_url":{"url":"', b"QUJD", b'"}}]}]}'),
    "token ids": _filled(b'{"prompt":[1', b",1", b"]}"),
    "token ids in a list": _filled(b'{"prompt":[[1', b",1", b"]]}"),
    "prompts": _filled(b'{"prompt":[""', b',""', b"]}"),
    "messages": _filled(_USER + b'""}', b',{"role":"","content":""}', b"]}"),
    "parts": _filled(_USER + b"[{}", b",{}", b"]}]}"),
    "texts": _filled(_USER + b'[""', b',""', b"]}]}"),
    "calls": _filled(b'{"messages":[{"role":"","tool_calls":[{}', b',{"b":[]}', b"]}]}"),
    "tools": _filled(b'{"messages":[{"role":"user"}],"tools":[{}', b',{"b":[]}', b"]}"),
    "strings": _filled(b'{"a":[""', b',""', b"]}"),
    "elements": _filled(b'{"a":[[]', b",[]", b"]}"),
    "objects": _filled(b'{"a":[{}', b',{"":0}', b"]}"),
    "numbers": _filled(b'{"a":[NaN', b",NaN", b"]}"),
    "nesting": _filled(b'{"a":[[]', b"," + b"[" * 190 + b"]" * 190, b"]}"),
    "escapes": _filled(b'{"prompt":"', b'\\"\\\\', b'"}'),
    "backslashes": _filled(b'{"a":"', b"\\\\", b'"}'),
    "letters": _filled(b'{"prompt":"', b"\\u006b", b'"}'),
    "key": _filled(b'{"', b"k", b'":1}'),
    "space": _filled(b'{"a":1', b" ", b"}"),
    "hand-off": _filled(b'{"kv_transfer_params":1,"a":[""', b',["b"]', b"]}"),
    "hand-off's name": _filled(b'{"a":[""', b',"kv_transfer_params"', b"]}"),
}
"""Those that are served."""

REFUSED: dict[str, Callable[[int], bytes]] = {
    "fields": _fields,
    "one field again": _filled(b'{"n":1', b',"n":1', b"}"),
    "hand-offs": _filled(b'{"a":1', b',"kv_transfer_params":1', b"}"),
    "number": _filled(b'{"a":1', b"0", b"}"),
    "field that is long": _filled(b'{"stream":[0', b",0", b"]}"),
    "no end": _filled(b'{"a":[0', b",0", b"}"),
    "too deep": _filled(b'{"a":[', b"[", b"]}"),
}
"""Those that get a 400."""

SHAPES = {**HARMLESS, **REFUSED}
