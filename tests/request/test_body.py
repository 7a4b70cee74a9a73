"""Request bodies: what is the client's stays as it is, and no hand-off of a client's gets through."""

import json
import random
import unittest
from typing import Any
from unittest.mock import patch

from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_pd_scheduler.connectors import Handoff, NixlConnector, Splice
from vllm_pd_scheduler.request import body as body_module
from vllm_pd_scheduler.request.body import UNREAD, JsonBody
from vllm_pd_scheduler.request.errors import BodyError
from vllm_pd_scheduler.request.handoff_key import HANDOFF_KEY, MAX_CUTS
from vllm_pd_scheduler.request.json_text import MAX_DEPTH, MAX_MEMBERS, finish

FIXED = settings(derandomize=True, deadline=None, max_examples=100)
PARAMS = {"do_remote_prefill": True, "remote_host": "10.0.0.1", "remote_block_ids": [[1, 2]]}
HANDOFF = Handoff(json.dumps(PARAMS).encode())


def walked(raw: bytes) -> JsonBody:
    """Parse a body of any size as those are that are too long to be decoded at once."""
    with patch.object(body_module, "AT_ONCE_BYTES", 0):
        return JsonBody.parse(raw)


def strip_handoff(raw: bytes) -> bytes:
    return finish(body_module.strip_handoff(raw))


WAYS = (JsonBody.parse, walked)

keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    ["prompt", "model", "max_tokens", "stream", "kv_transfer_param", "xkv_transfer_params", "\\u006b"]
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    | st.sampled_from([HANDOFF_KEY, f'{{"{HANDOFF_KEY}": 1}}'])  # as a value it is a word like any other
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)
documents = st.dictionaries(keys, values, max_size=5)


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    """How ``json.dumps`` writes: compact or not, escaped or not."""
    separators = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t: ")]))
    return {
        "ensure_ascii": draw(st.booleans()),
        "separators": separators,
        "indent": draw(st.sampled_from([None, 2])),
    }


@st.composite
def spellings(draw: st.DrawFn) -> str:
    """The key's name as JSON text, any of its letters as \\uXXXX."""
    text = ""
    for letter in HANDOFF_KEY:
        how = draw(st.integers(0, 2))
        text += [letter, f"\\u{ord(letter):04x}", f"\\u{ord(letter):04X}"][how]
    return f'"{text}"'


@st.composite
def poisoned(draw: st.DrawFn) -> tuple[str, Any]:
    """A document in which the key stands at some places, and the same without it."""
    chance = random.Random(draw(st.integers(0, 2**16)))
    names = draw(st.lists(spellings(), min_size=1, max_size=4))
    document = draw(documents)
    used = 0

    def write(value: Any) -> str:
        nonlocal used
        if isinstance(value, list):
            return "[" + ", ".join(map(write, value)) + "]"
        if not isinstance(value, dict):
            return json.dumps(value)
        members = [f"{json.dumps(key)}: {write(item)}" for key, item in value.items()]
        for _ in range(chance.choice((0, 1, 1, 2))):
            members.insert(chance.randint(0, len(members)), f"{chance.choice(names)}: {json.dumps(PARAMS)}")
            used += 1
        return "{" + ",".join(members) + "}"

    text = write(document)
    if not used:
        text = f"{{{names[0]}: null" + (", " if document else "") + text[1:]
    return text, document


def without_key(value: Any) -> Any:
    """An independent reading of what must be left."""
    if isinstance(value, dict):
        return {key: without_key(item) for key, item in value.items() if key != HANDOFF_KEY}
    return [without_key(item) for item in value] if isinstance(value, list) else value


def with_field(body: JsonBody, key: str, value: bytes) -> bytes:
    return Splice(*body.one_more(key, value)).into(body.raw)


class SplicingTest(unittest.TestCase):
    @given(document=documents, layout=layouts(), space=st.sampled_from(["", " ", "\r\n\t"]))
    @FIXED
    def test_decode_gets_the_document_and_the_hand_off(
        self, document: dict[str, Any], layout: dict[str, Any], space: str
    ) -> None:
        raw = (space + json.dumps(document, **layout) + space).encode()
        for parse in WAYS:
            body = parse(raw)
            self.assertFalse(body.stripped)
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
            sent = json.loads(NixlConnector().prefill_body(parse(raw)))
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


class StrippingTest(unittest.TestCase):
    @given(case=poisoned())
    @FIXED
    @example(case=('{"kv_transfer_params": {}, "kv_transfer_params": {"a": 1}}', {}))
    @example(case=('{"a": [[{"b": {"\\u006Bv_transfer_params": 1}}]]}', {"a": [[{"b": {}}]]}))
    def test_no_spelling_at_any_depth_gets_through(self, case: tuple[str, Any]) -> None:
        text, document = case
        raw = text.encode()
        self.assertEqual(without_key(json.loads(raw)), document)
        for parse in WAYS:
            body = parse(raw)
            self.assertTrue(body.stripped)
            for clean in (body.raw, strip_handoff(raw)):
                self.assertEqual(json.loads(clean), document, "nothing else is lost or changed")
            self.assertEqual(
                json.loads(NixlConnector().splice(body, HANDOFF).into(body.raw)),
                {**document, HANDOFF_KEY: PARAMS},
            )

    def test_each_letter_alone_can_be_escaped(self) -> None:
        for position, letter in enumerate(HANDOFF_KEY):
            for form in ("\\u{:04x}", "\\u{:04X}"):
                name = HANDOFF_KEY[:position] + form.format(ord(letter)) + HANDOFF_KEY[position + 1 :]
                with self.subTest(name):
                    raw = f'{{"a": [{{"{name}": 1}}]}}'.encode()
                    for clean in (*(parse(raw).raw for parse in WAYS), strip_handoff(raw)):
                        self.assertEqual(clean, b'{"a": [{}]}')

    def test_nothing_else_is_touched(self) -> None:
        key, other = b'"kv_transfer_params" : [1, {"a": "}"}]', b'"a" : [ ]'
        for raw, clean in (
            (b"{ %b }" % key, b"{}"),
            (b"{ %b , %b }" % (key, other), b"{ %b }" % other),
            (b"{ %b , %b }" % (other, key), b"{ %b }" % other),
            (b"{%b,%b , %b,%b}" % (key, key, other, key), b"{%b}" % other),
            (b"{%b,%b,%b,%b}" % (other, key, key, key), b"{%b}" % other),
            (b"{%b , \n %b}" % (key, key), b"{}"),
            (b'{"x":[{%b},{%b}],%b}' % (key, key, other), b'{"x":[{},{}],%b}' % other),
        ):
            for found in (*(parse(raw).raw for parse in WAYS), strip_handoff(raw)):
                with self.subTest(raw):
                    self.assertEqual(found, clean)

    def test_the_key_as_text_is_no_key(self) -> None:
        for raw in (
            b'{"prompt": "what is kv_transfer_params?"}',
            b'{"prompt": "{\\"kv_transfer_params\\": 1}"}',
            b'{"prompt": "\\u006bv"}',
            b'{"kv_transfer_params_": 1, "my_kv_transfer_params": 2, "KV_TRANSFER_PARAMS": 3}',
            b'{"\\\\u006bv_transfer_params": 1}',
        ):
            with self.subTest(raw):
                self.assertIs(JsonBody.parse(raw).raw, raw)
                self.assertIs(strip_handoff(raw), raw)

    def test_text_that_is_no_json(self) -> None:
        """Nobody should be able to read it, but no spelling of the key rides on that."""
        hidden = b'"kv\\u005ftransfer_params": {"do_remote_prefill": true}}'
        for raw in (
            b'{"prompt": "\xff", ' + hidden,
            b'{"prompt": "x", "seed": ' + b"1" * 5000 + b", " + hidden,
            b'{"a": "kv_tr' + hidden[:-1] + b',ansfer_params": 1}',
            b'{"kv_tr"kv_transfer_params":1,ansfer_params":{"a":1}}',
            b'{"a": 1 "kv_transfer_params": 1}',
            b'{"a": ["kv_transfer_params": 1]}',
            b'{"kv_transfer_params": {"a": 1}',
            b'{"kv_transfer_params" "kv_transfer_params": [}',
            b'{"kv_transfer_params":',
            b"{" + b"\\" * 5000 + b'"kv_transfer_params":1}',
            b'{"a":1,' + b" " * 5000 + b'"kv_transfer_params":1}',
        ):
            for call in (strip_handoff, *((lambda raw, parse=parse: parse(raw).raw) for parse in WAYS)):
                with self.subTest(raw[:40]):
                    try:
                        clean = call(raw)
                    except BodyError:
                        continue
                    self.assertNotRegex(clean.replace(b"\\u005f", b"_"), rb'"kv_transfer_params"\s*:')

    def test_encodings_in_which_it_could_hide(self) -> None:
        text = '{"kv_transfer_params": 1}'
        for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"):
            with self.subTest(encoding):
                with self.assertRaisesRegex(BodyError, "UTF-8"):
                    strip_handoff(text.encode(encoding))
                with self.assertRaises(BodyError):
                    JsonBody.parse(text.encode(encoding))
        self.assertEqual(strip_handoff(text.encode("utf-8-sig")), b"\xef\xbb\xbf{}")

    def test_bodies_that_are_no_json_pass_on_other_paths(self) -> None:
        for raw in (b"", b"\xff\xd8\xff\xe0 an image", b"--boundary\r\n\r\nRIFF\\u006b", b"not json"):
            with self.subTest(raw):
                self.assertIs(strip_handoff(raw), raw)
        with self.assertRaisesRegex(BodyError, "which only the router sets"):
            strip_handoff(b"--boundary\r\nkv_transfer_params")

    def test_depth(self) -> None:
        def nested(depth: int, inner: str) -> bytes:
            return ('{"a":' * depth + inner + "}" * depth).encode()

        key = '{"kv_transfer_params": 1}'
        self.assertEqual(strip_handoff(nested(MAX_DEPTH - 1, key)), nested(MAX_DEPTH - 1, "{}"))
        for inner in (key, "1", '"x"', "[]"):
            for depth in (MAX_DEPTH + 1, 300, 5_000, 200_000):
                for call in (strip_handoff, JsonBody.parse):
                    with (
                        self.subTest(depth=depth, call=call),
                        self.assertRaisesRegex(BodyError, "too deep"),
                    ):
                        call(nested(depth, inner))
        JsonBody.parse(nested(MAX_DEPTH, '"x"'))
        strip_handoff(b"--boundary" + nested(MAX_DEPTH + 1, "1"))  # no JSON: not for a parser of JSON

    def test_large_bodies(self) -> None:
        filler = b"x" * 300_000
        for key in (b"kv_transfer_params", b"\\u006bv_transfer_params"):
            for before in (b'{"prompt":"%b",' % filler, b'{"a":[{"b":"%b"},{' % filler):
                member = b'"%b":{"c":"%b"}' % (key, filler)
                after = b"}]}" if b"[" in before else b',"d":1}'
                raw, clean = before + member + after, before.removesuffix(b",") + after
                with self.subTest(key=key, before=before[:8]):
                    self.assertEqual(json.loads(strip_handoff(raw)), json.loads(clean))
                    self.assertEqual(json.loads(JsonBody.parse(raw).raw), json.loads(clean))

    def test_a_body_that_is_full_of_it(self) -> None:
        for inner in (b'"kv_transfer_params":1,', b'"a":{"kv_transfer_params":1},'):
            raw = b"{" + inner * MAX_CUTS + b'"b":1}'
            self.assertEqual(json.loads(strip_handoff(raw))["b"], 1)
            for call in (strip_handoff, *WAYS):
                with self.assertRaisesRegex(BodyError, "more than 1000 places"):
                    call(b"{" + inner + raw[1:])


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
