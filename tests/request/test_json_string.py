"""Long strings, decoded piece by piece: the same as in one piece, wherever they are cut."""

import json
import unittest
from unittest.mock import patch

import msgspec
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_pd_scheduler.request import json_string
from vllm_pd_scheduler.request.json_string import string_content
from vllm_pd_scheduler.request.json_text import STEP_BYTES, Value


def decoded(text: bytes, step: int) -> bytes:
    with patch.object(json_string, "STEP_BYTES", step):
        return b"".join(string_content(Value(b"[" + text + b"]", 1, len(text) + 1)))


letters = st.sampled_from(["a", "é", "語", "\U0001f600", "\\", '"', "\n", "/", "u", "d", "8", "\\ud83d"])


class StringTest(unittest.TestCase):
    @given(st.lists(letters, max_size=60).map("".join), st.integers(16, 40), st.booleans())
    @settings(derandomize=True, deadline=None, max_examples=1500)
    @example("\U0001f600" * 20, 16, True)
    @example("\\" * 60, 17, True)
    @example("\\ud83d" * 20, 17, True)
    def test_it_is_what_a_parser_says(self, content: str, step: int, ascii_only: bool) -> None:
        text = json.dumps(content, ensure_ascii=ascii_only).encode()
        self.assertEqual(decoded(text, step), content.encode())

    def test_pieces_are_bounded(self) -> None:
        for unit in ("x", "\\", "é", "\U0001f600", "\n"):
            text = json.dumps(unit * 100_000).encode()
            pieces = list(string_content(Value(text, 0, len(text))))
            self.assertLessEqual(max(map(len, pieces)), STEP_BYTES)
            self.assertEqual(b"".join(pieces), unit.encode() * 100_000)

    def test_what_stands_for_nothing(self) -> None:
        for text in (b'"\\ud800"', b'"' + b"x" * 100 + b'\\ud83dx"', b'"\\udc00%b"' % (b"x" * 100)):
            with self.subTest(text[:9]), self.assertRaises(msgspec.DecodeError):
                decoded(text, 16)


if __name__ == "__main__":
    unittest.main()
