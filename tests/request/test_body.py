"""Request bodies: what is the client's stays as it is, and is read as vLLM reads it."""

import json
import random
import unittest
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.request.documents import (
    FIXED,
    HANDOFF,
    PARAMS,
    WAYS,
    documents,
    layouts,
    strip_handoff,
    walked,
    with_field,
)
from tests.support.connectors import LEGS
from vllm_pd_scheduler.connectors import NixlConnector
from vllm_pd_scheduler.request.body import UNREAD, JsonBody
from vllm_pd_scheduler.request.errors import BodyError
from vllm_pd_scheduler.request.handoff_key import HANDOFF_KEY
from vllm_pd_scheduler.request.json_text import AT_ONCE_BYTES, MAX_MEMBERS, finish
from vllm_pd_scheduler.request.passed_body import asks_for_stream


class StreamTest(unittest.TestCase):
    VALUES = (
        *((value, True) for value in ("true", "1", "1.0", '"true"', '"YES"', '"on"', '"T"', '"1"')),
        *((value, False) for value in ("false", "0", "null", "2", '"no"', '""', "[true]", '{"a":true}')),
    )
    """Values of ``stream``, and what pydantic makes of them, or that it refuses them."""

    def test_it_is_read_as_vllm_reads_it(self) -> None:
        long = json.dumps({"prompt": "x" * AT_ONCE_BYTES})[:-1]
        for value, expected in self.VALUES:
            for start in ('{"prompt":"x"', long):
                body = f'{start},"stream":{value}}}'.encode()
                with self.subTest(value, size=len(body)):
                    self.assertIs(JsonBody.parse(body).wants_stream, expected)
                    self.assertIs(finish(asks_for_stream(body)), expected)

    def test_other_bodies_ask_for_none(self) -> None:
        more = b"x" * AT_ONCE_BYTES
        for body in (
            b"",
            b"stream",
            b'["stream", true]',
            b'{"a":{"stream":true}}',
            b'{"stream":true',
            b'{"a":"\xff","stream":tru}',
            b'{"stream":' + b"9" * 5000 + b"}",
            b"[" * 100_000 + b'"stream"',
            b'{"stream":' + b"[" * 100_000,
            b'{"a":"' + more + b'","stream":tru}',
            b'{"a":"' + more + b'","b":{"stream":true}}',
            b'--x\r\ncontent-disposition: form-data; name="stream"\r\n\r\ntrue\r\n--x--' + more,
        ):
            with self.subTest(body[:40]):
                self.assertIs(finish(asks_for_stream(body)), False)


class SplicingTest(unittest.TestCase):
    @given(document=documents, layout=layouts(), space=st.sampled_from(["", " ", "\r\n\t"]))
    @FIXED
    def test_decode_gets_the_document_and_the_hand_off(
        self, document: dict[str, Any], layout: dict[str, Any], space: str
    ) -> None:
        raw = (space + json.dumps(document, **layout) + space).encode()
        for parse in WAYS:
            body = parse(raw)
            self.assertFalse(body.changed)
            sent = NixlConnector().splice(body, HANDOFF).into(raw)
            self.assertEqual(json.loads(sent), {**document, HANDOFF_KEY: PARAMS})
            self.assertEqual(list(json.loads(sent))[-1], HANDOFF_KEY)
            self.assertTrue(sent.startswith(raw.rstrip()[:-1]), "the client's own bytes, unchanged")

    @given(document=documents, layout=layouts())
    @FIXED
    def test_prefill_gets_the_document_for_one_token(
        self, document: dict[str, Any], layout: dict[str, Any]
    ) -> None:
        document = {**document, "min_tokens": 5, "stream_options": {"include_usage": True}}
        members = list(document.items())
        random.Random(len(members)).shuffle(members)
        raw = json.dumps(dict(members), **layout).encode()
        for parse in WAYS:
            sent = json.loads(NixlConnector().prefill_body(parse(raw), LEGS))
            self.assertIs(sent.pop(HANDOFF_KEY)["do_remote_decode"], True)
            self.assertEqual((sent.pop("max_tokens"), sent.pop("stream")), (1, False))
            dropped = {"min_tokens", "stream_options", "max_tokens", "stream"}
            self.assertEqual(sent, {key: value for key, value in document.items() if key not in dropped})

    @given(document=documents, layout=layouts())
    @FIXED
    def test_bodies_without_the_key_are_not_touched(
        self, document: dict[str, Any], layout: dict[str, Any]
    ) -> None:
        raw = json.dumps(document, **layout).encode()
        for parse in WAYS:
            self.assertIs(parse(raw).raw, raw)
        self.assertIs(strip_handoff(raw), raw)

    def test_doubled_keys_are_read_as_vllm_reads_them(self) -> None:
        for parse in WAYS:
            body = parse(b'{"max_tokens": 1, "a": 2, "\\u006dax_tokens": 7}')
            self.assertEqual(body.get("max_tokens"), 7)
            self.assertEqual(json.loads(body.replace(set(), {"b": b"3"})), {"max_tokens": 7, "a": 2, "b": 3})
            self.assertEqual(json.loads(body.replace({"max_tokens"}, {"b": b"3"})), {"a": 2, "b": 3})
            self.assertEqual(json.loads(with_field(body, "b", b"3")), {"max_tokens": 7, "a": 2, "b": 3})

    def test_replace(self) -> None:
        raw = b'{"user": 1, "b": [1, 2 ],"n" : "x"}'
        for parse in WAYS:
            body = parse(raw)
            for drop, add, left in (
                ({"model"}, {"n": b"5"}, {"user": 1, "b": [1, 2], "n": 5}),
                ({"n"}, {"user": b"5"}, {"b": [1, 2], "user": 5}),
                ({"user"}, {"d": b"{}"}, {"b": [1, 2], "n": "x", "d": {}}),
                ({"user", "n"}, {"d": b"{}"}, {"b": [1, 2], "d": {}}),
            ):
                with self.subTest(drop, parse=parse):
                    self.assertEqual(json.loads(body.replace(drop, add)), left)
            for empty in (b"{}", b" { } ", b'{"user":1 }'):
                self.assertEqual(parse(empty).replace({"user"}, {"b": b"1"}), b'{"b":1}')

    def test_replace_with_a_key_that_is_not_utf_8(self) -> None:
        sent = JsonBody.parse(b'{"\xff": 1, "n": 2, "user": 3}').replace({"n"}, {"b": b"1"})
        self.assertEqual(sent, b'{"\xff": 1, "user": 3,"b":1}')

    def test_one_more_field(self) -> None:
        for parse in WAYS:
            self.assertEqual(with_field(parse(b"{}"), "k", b"1"), b'{"k":1}')
            self.assertEqual(with_field(parse(b" { } \n"), "k", b"1"), b' { "k":1}')
            self.assertEqual(with_field(parse(b'{"a":1 }'), '"', b"null"), b'{"a":1 ,"\\"":null}')
            self.assertEqual(with_field(parse(b'{"a":{} }'), "k", b"1"), b'{"a":{} ,"k":1}')


class FieldsTest(unittest.TestCase):
    RAW = b'{"model": "m", "n" :2, "prompt":\n[ 1], "echo": null, "user": "\xff"}'

    def test_get(self) -> None:
        for parse in WAYS:
            body = parse(self.RAW)
            self.assertEqual([body.get(key) for key in ("model", "n", "prompt")], ["m", 2, [1]])
            self.assertEqual([body.get(key) for key in ("stream", "echo", "user")], [None, None, UNREAD])
            self.assertEqual([body.has(key) for key in ("stream", "echo", "user")], [False, True, True])
            self.assertEqual([body.length(key) for key in ("stream", "echo", "prompt")], [0, 4, 4])

    def test_a_field_that_is_not_read_here_is_a_mistake(self) -> None:
        for parse in WAYS:
            for call in ("get", "has", "length"):
                with self.assertRaises(AttributeError):
                    getattr(parse(self.RAW), call)("temperature")

    def test_what_is_too_long_is_not_read(self) -> None:
        for parse in WAYS:
            body = parse(b'{"model": "' + b"m" * 5000 + b'", "user": "u"}')
            self.assertIs(body.get("model"), UNREAD)
            self.assertEqual((body.get("user"), body.length("model")), ("u", 5002))

    def test_the_only_prompt(self) -> None:
        for text, only in (
            (b'"a"', b'"a"'),
            (b'["a"]', b'"a"'),
            (b'[ "a]," ]', b'"a],"'),
            (b'["a", "b"]', None),
            (b"[1, 2]", b"[1, 2]"),
            (b"[[1, 2]]", b"[1, 2]"),
            (b"[[1, 2], [3]]", None),
            (b"[]", None),
            (b'[{"a": 1}]', None),
            (b"null", b"null"),
            (b"{}", b"{}"),
            (b"[true]", b"[true]"),
        ):
            for parse in WAYS:
                with self.subTest(text, parse=parse):
                    found = parse(b'{"a": 1, "prompt": ' + text + b', "n": 1}').only_prompt()
                    self.assertEqual(found and found.copy(), only)
        for parse in WAYS:
            self.assertIsNone(parse(b'{"messages": []}').only_prompt())


class AsVllmReadsThemTest(unittest.TestCase):
    """What ``json.loads`` reads, which is what vLLM calls, and JSON's own grammar does not know."""

    ODD: tuple[bytes, ...] = (
        b'\xef\xbb\xbf{"n": 1, "prompt": "p"}',
        b"\xef\xbb\xbf \r\n{ }",
        b'{"n": NaN, "prompt": "p"}',
        b'{"a": [Infinity, {"b": -Infinity}], "n": 3, "prompt": "p"}',
        b'{"a": "\\ud800", "n": 3}',
        b'{"\\udc00": 1, "n": 3, "prompt": "x\\ud83d"}',
        b'{"a": "\xed\xa0\x80", "\xed\xb0\x80": NaN, "n": 2}',
        b'{"a": 1e999, "n": -0, "prompt": "\\ud83d\\ude00"}',
    )

    def test_they_are_split_and_sent_as_they_are(self) -> None:
        for raw in self.ODD:
            document = json.loads(raw)
            for parse in WAYS:
                with self.subTest(raw, parse=parse):
                    body = parse(raw)
                    self.assertIs(body.raw, raw)
                    sent = with_field(body, HANDOFF_KEY, b"1")
                    self.assertEqual(repr(json.loads(sent)), repr({**document, HANDOFF_KEY: 1}))
                    left = {key: value for key, value in document.items() if key != "n"}
                    sent = body.replace({"n"}, {"b": b"3"})
                    self.assertEqual(repr(json.loads(sent)), repr({**left, "b": 3}))

    def test_the_hand_off_is_taken_out_of_them(self) -> None:
        for raw in self.ODD:
            document = json.loads(raw)
            end = raw.rindex(b"}")
            comma = b"," if document else b""
            poisoned = raw[:end] + comma + b'"k\\u0076_transfer_params": {"a": NaN}' + raw[end:]
            for clean in (*(parse(poisoned).raw for parse in WAYS), strip_handoff(poisoned)):
                with self.subTest(raw):
                    self.assertEqual(repr(json.loads(clean)), repr(document))

    def test_what_vllm_does_not_read_either(self) -> None:
        for raw in (
            b"\xef\xbb\xbf\xef\xbb\xbf{}",
            b" \xef\xbb\xbf{}",
            b'{"a": nan}',
            b'{"a": +Infinity}',
            b'{"a": -NaN}',
            b'{"a": Infinityx}',
            b'{"a": [NaN, 1 2]}',
            b'{"a": NaN, "b": "\x01"}',
        ):
            with self.subTest(raw):
                with self.assertRaises(ValueError):
                    json.loads(raw)
                with self.assertRaises(BodyError):
                    JsonBody.parse(raw)


class RefusalsTest(unittest.TestCase):
    def test_what_is_no_json_object(self) -> None:
        cases = [
            b"[]",
            b'"x"',
            b"1",
            b"null",
            b"{",
            b'{"a"}',
            b'{"a":1}}',
            b"{'a': 1}",
            b"\xff",
        ]
        cases += [b'{"a":1,}', b'{"a": "\n"}', b"\xef\xbb\xbf", b" ", b"[NaN]"]
        for raw in cases:
            with (
                self.subTest(raw),
                self.assertRaisesRegex(BodyError, "^The request body is not a valid JSON object: "),
            ):
                JsonBody.parse(raw)

    def test_what_is_no_object_is_found_in_steps_too(self) -> None:
        for raw in (
            b"[]",
            b"1",
            b" ",
            b"{",
            b'{"a"}',
            b'{"a" 1}',
            b'{"a":}',
            b'{"a":1',
            b'{"a":1}}',
            b'{"a":1,}',
            b'{,"a":1}',
            b'{"a":1 "b":2}',
            b'{"a":1,,"b":2}',
            b'{"a":01}',
            b'{"a":1.}',
            b'{"a":-}',
            b'{"a":tru}',
            b'{"a":[}',
            b'{"a":"x}',
            b'{"a":"\\',
            b'{"a":1}x',
            b'{"n":[1 2]}',
            b'{"n":"\\x","n":1}',
            b'{"n":1' + b"0" * 5000 + b"}",
            b'{"prompt":["a" 1]}',
            b"{'a': 1}",
        ):
            with self.subTest(raw[:20]), self.assertRaisesRegex(BodyError, "not a valid JSON object"):
                walked(raw)

    def test_too_many_fields(self) -> None:
        def raw(count: int) -> bytes:
            return json.dumps({"n": 2, **{f"key{number}": number for number in range(count - 1)}}).encode()

        self.assertEqual(JsonBody.parse(raw(MAX_MEMBERS)).get("n"), 2)
        with self.assertRaisesRegex(BodyError, "too many fields: 4096"):
            JsonBody.parse(raw(MAX_MEMBERS + 1))
        with self.assertRaisesRegex(BodyError, "too many times"):
            walked(b'{"n":1' + b',"n":1' * 70 + b"}")

    def test_no_body(self) -> None:
        with self.assertRaisesRegex(BodyError, "has no body"):
            JsonBody.parse(b"")

    @given(raw=st.binary(max_size=40) | st.text('{}[]":,\\u0 kv_n', max_size=40).map(str.encode))
    @settings(derandomize=True, deadline=None, max_examples=200)
    def test_whatever_comes_it_is_an_answer_or_a_body_error(self, raw: bytes) -> None:
        for call in (*WAYS, strip_handoff):
            try:
                call(raw)
            except BodyError as error:
                self.assertTrue(str(error))

    @given(raw=st.text('{}[]":,\\ N1a', max_size=30).map(str.encode))
    @settings(derandomize=True, deadline=None, max_examples=500)
    @example(raw=b'{"a":[1],"n":2}')
    def test_what_json_reads_is_read_in_steps_too(self, raw: bytes) -> None:
        try:
            document = json.loads(raw)
        except ValueError:
            return
        if isinstance(document, dict):
            self.assertEqual(json.loads(with_field(walked(raw), "k", b"1")), {**document, "k": 1})


if __name__ == "__main__":
    unittest.main()
