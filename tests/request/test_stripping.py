"""No hand-off of a client's gets through, however it is spelled and wherever it stands."""

import json
import unittest
from typing import Any

from hypothesis import example, given

from tests.request.documents import (
    FIXED,
    HANDOFF,
    PARAMS,
    WAYS,
    poisoned,
    strip_handoff,
    without_key,
)
from vllm_pd_scheduler.connectors import NixlConnector
from vllm_pd_scheduler.request.body import JsonBody
from vllm_pd_scheduler.request.errors import BodyError
from vllm_pd_scheduler.request.handoff_key import ENCODED_KEY, HANDOFF_KEY, MAX_CUTS
from vllm_pd_scheduler.request.json_text import MAX_DEPTH


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
            self.assertTrue(body.changed)
            for clean in (body.raw, strip_handoff(raw)):
                self.assertEqual(json.loads(clean), document, "nothing else is lost or changed")
            self.assertEqual(
                json.loads(NixlConnector().splice(body, HANDOFF).into(body.raw)),
                {**document, HANDOFF_KEY: PARAMS},
            )

    def test_each_letter_alone_can_be_escaped(self) -> None:
        letters = ((key, *each) for key in (HANDOFF_KEY, ENCODED_KEY) for each in enumerate(key))
        for key, position, letter in letters:
            for form in ("\\u{:04x}", "\\u{:04X}"):
                name = key[:position] + form.format(ord(letter)) + key[position + 1 :]
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
        for key in (b"kv_transfer_params", b"\\u006bv_transfer_params", b"ec_transfer_params"):
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


if __name__ == "__main__":
    unittest.main()
