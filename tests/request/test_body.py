"""Request bodies: what is the client's stays as it is, and no hand-off of a client's gets through."""

import json
import random
import unittest
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_pd_scheduler.connectors import Handoff, NixlConnector
from vllm_pd_scheduler.request.body import (
    HANDOFF_KEY,
    MAX_DEPTH,
    MAX_REWRITTEN_BYTES,
    BodyError,
    JsonBody,
    strip_handoff,
)

FIXED = settings(derandomize=True, deadline=None, max_examples=100)
PARAMS = {"do_remote_prefill": True, "remote_host": "10.0.0.1", "remote_block_ids": [[1, 2]]}
HANDOFF = Handoff(json.dumps(PARAMS).encode())

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


class SplicingTest(unittest.TestCase):
    @given(document=documents, layout=layouts(), space=st.sampled_from(["", " ", "\r\n\t"]))
    @FIXED
    def test_decode_gets_the_document_and_the_hand_off(
        self, document: dict[str, Any], layout: dict[str, Any], space: str
    ) -> None:
        raw = (space + json.dumps(document, **layout) + space).encode()
        body = JsonBody.parse(raw)
        self.assertFalse(body.stripped)
        sent, _ = NixlConnector().decode_body(body, HANDOFF)
        self.assertEqual(json.loads(sent), {**document, HANDOFF_KEY: PARAMS})
        self.assertEqual(list(json.loads(sent))[-1], HANDOFF_KEY)
        self.assertTrue(sent.startswith(raw.rstrip()[:-1]), "the client's own bytes, unchanged")

    @given(document=documents, layout=layouts())
    @FIXED
    def test_prefill_gets_the_document_for_one_token(
        self, document: dict[str, Any], layout: dict[str, Any]
    ) -> None:
        document = {**document, "min_tokens": 5, "stream_options": {"include_usage": True}}
        sent = json.loads(
            NixlConnector().prefill_body(JsonBody.parse(json.dumps(document, **layout).encode()))
        )
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
        self.assertIs(JsonBody.parse(raw).raw, raw)
        self.assertIs(strip_handoff(raw), raw)

    def test_doubled_keys_are_read_as_vllm_reads_them(self) -> None:
        body = JsonBody.parse(b'{"max_tokens": 1, "a": 2, "max_tokens": 7}')
        self.assertEqual(body.get("max_tokens"), 7)
        self.assertEqual(json.loads(body.replace((), {})), {"max_tokens": 7, "a": 2})
        self.assertEqual(json.loads(body.with_field("b", b"3")[0]), {"max_tokens": 7, "a": 2, "b": 3})

    def test_replace(self) -> None:
        body = JsonBody.parse(b'{"a": 1, "b": [1, 2 ],"c" : "x"}')
        self.assertEqual(body.replace({"b", "none"}, {"a": b"5", "d": b"{}"}), b'{"c":"x","a":5,"d":{}}')
        self.assertEqual(body.replace({"a", "b", "c"}, {}), b"{}")
        self.assertEqual(JsonBody.parse(b"{}").replace({"a"}, {"b": b"1"}), b'{"b":1}')

    def test_with_field(self) -> None:
        self.assertEqual(JsonBody.parse(b"{}").with_field("k", b"1"), (b'{"k":1}', 1))
        self.assertEqual(JsonBody.parse(b" { } \n").with_field("k", b"1"), (b' { "k":1}', 3))
        self.assertEqual(JsonBody.parse(b'{"a":1 }').with_field('"', b"null"), (b'{"a":1 ,"\\"":null}', 7))


class FieldsTest(unittest.TestCase):
    BODY = JsonBody.parse(b'{"model": "m", "n" :2, "p":\n[ 1], "z": null, "bad": "\xff"}')

    def test_get(self) -> None:
        self.assertEqual([self.BODY.get(key) for key in ("model", "n", "p")], ["m", 2, [1]])
        self.assertEqual([self.BODY.get(key) for key in ("none", "z", "bad")], [None, None, None])

    def test_starts_with(self) -> None:
        self.assertTrue(self.BODY.starts_with("p", b"["))
        self.assertFalse(self.BODY.starts_with("n", b"["))
        self.assertFalse(self.BODY.starts_with("none", b"["))


class StrippingTest(unittest.TestCase):
    @given(case=poisoned())
    @FIXED
    @example(case=('{"kv_transfer_params": {}, "kv_transfer_params": {"a": 1}}', {}))
    @example(case=('{"a": [[{"b": {"\\u006Bv_transfer_params": 1}}]]}', {"a": [[{"b": {}}]]}))
    def test_no_spelling_at_any_depth_gets_through(self, case: tuple[str, Any]) -> None:
        text, document = case
        raw = text.encode()
        self.assertEqual(without_key(json.loads(raw)), document)
        body = JsonBody.parse(raw)
        self.assertTrue(body.stripped)
        self.assertNotIn(HANDOFF_KEY, body.fields)
        for clean in (body.raw, strip_handoff(raw)):
            self.assertEqual(json.loads(clean), document, "nothing else is lost or changed")
        self.assertEqual(
            json.loads(NixlConnector().decode_body(body, HANDOFF)[0]), {**document, HANDOFF_KEY: PARAMS}
        )

    def test_each_letter_alone_can_be_escaped(self) -> None:
        for position, letter in enumerate(HANDOFF_KEY):
            for form in ("\\u{:04x}", "\\u{:04X}"):
                name = HANDOFF_KEY[:position] + form.format(ord(letter)) + HANDOFF_KEY[position + 1 :]
                with self.subTest(name):
                    raw = f'{{"a": [{{"{name}": 1}}]}}'.encode()
                    self.assertEqual(JsonBody.parse(raw).raw, b'{"a":[{}]}')
                    self.assertEqual(strip_handoff(raw), b'{"a":[{}]}')

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

    def test_what_msgspec_reads_and_json_does_not(self) -> None:
        """Whether vLLM could read them or not: a key in disguise must not pass with them."""
        hidden = b'"kv\\u005ftransfer_params": {"do_remote_prefill": true}}'
        for raw in (
            b'{"prompt": "\xff", ' + hidden,
            b'{"prompt": "x", "seed": ' + b"1" * 5000 + b", " + hidden,
            b'{"prompt": "\xed\xa0\x80\xff", ' + hidden,
        ):
            with self.subTest(raw[:24]):
                with self.assertRaises(BodyError):
                    JsonBody.parse(raw)
                with self.assertRaises(BodyError):
                    strip_handoff(raw)

    def test_encodings_in_which_it_could_hide(self) -> None:
        text = '{"kv_transfer_params": 1}'
        for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"):
            with self.subTest(encoding):
                with self.assertRaisesRegex(BodyError, "UTF-8"):
                    strip_handoff(text.encode(encoding))
                with self.assertRaises(BodyError):
                    JsonBody.parse(text.encode(encoding))
        self.assertEqual(strip_handoff(text.encode("utf-8-sig")), b"{}")

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

    def test_a_large_body_is_not_written_anew(self) -> None:
        large = b'{"prompt":"' + b"x" * MAX_REWRITTEN_BYTES + b'"'
        for call in (strip_handoff, JsonBody.parse):
            call(large + b"}")
            for key in (b"kv_transfer_params", b"\\u006bv_transfer_params"):
                with self.assertRaisesRegex(BodyError, "more than 8 MiB"):
                    call(large + b',"' + key + b'":1}')


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
            b'{"a": NaN}',
            b"\xff",
        ]
        cases += [b'{"a":1,}', b'{"a": "\n"}', b"\xef\xbb\xbf{}", b" "]
        for raw in cases:
            with (
                self.subTest(raw),
                self.assertRaisesRegex(BodyError, "^The request body is not a valid JSON object: "),
            ):
                JsonBody.parse(raw)

    def test_no_body(self) -> None:
        with self.assertRaisesRegex(BodyError, "has no body"):
            JsonBody.parse(b"")

    @given(raw=st.binary(max_size=40) | st.text('{}[]":,\\u0 kv_n', max_size=40).map(str.encode))
    @settings(derandomize=True, deadline=None, max_examples=200)
    def test_whatever_comes_it_is_an_answer_or_a_body_error(self, raw: bytes) -> None:
        for call in (JsonBody.parse, strip_handoff):
            try:
                call(raw)
            except BodyError as error:
                self.assertTrue(str(error))


if __name__ == "__main__":
    unittest.main()
