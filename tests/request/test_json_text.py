"""JSON text: where values end and how deep they are, as a parser finds it, in steps of bounded work."""

import contextlib
import json
import random
import unittest
from typing import Any
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_pd_scheduler.request import json_text
from vllm_pd_scheduler.request.json_text import (
    MAX_MEMBERS,
    STEP_BYTES,
    JsonText,
    Malformed,
    TooDeep,
    TooMany,
    depth,
    finish,
    is_deeper,
)


def levels(value: Any) -> int:
    """An independent count."""
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(levels, value), default=0) if isinstance(value, list) else 0


def document(chance: random.Random, most: int) -> Any:
    """A document with brackets, quotes and backslashes in its strings."""
    kind = chance.randrange(4) if most else 0
    if kind == 0:
        return chance.choice((None, True, -1.5e-7, 0, float("inf"), float("nan")))
    if kind == 1:
        return "".join(chance.choices('[]{}"\\\n/aé\ud800', k=chance.choice((0, 1, 5, 300))))
    size = chance.randrange(4)
    if kind == 2:
        return [document(chance, most - 1) for _ in range(size)]
    return {str(document(chance, 1)): document(chance, most - 1) for _ in range(size)}


def written(chance: random.Random, made: Any) -> bytes:
    text = json.dumps(made, ensure_ascii=chance.random() < 0.5, indent=chance.choice((None, 1)))
    return text.encode("utf-8", "surrogatepass")


class WalkTest(unittest.TestCase):
    def test_values_end_where_a_parser_says(self) -> None:
        chance = random.Random(7)
        for _ in range(1500):
            made = document(chance, 8)
            text = written(chance, made)
            at = chance.randrange(4)
            padded = b'"' * at + text + chance.choice((b"", b",", b" ", b"]", b'}"['))
            self.assertEqual(finish(JsonText(padded).skip(at)), at + len(text), text)

    def test_depth_is_what_a_parser_finds(self) -> None:
        chance = random.Random(8)
        for _ in range(1500):
            made = document(chance, 8)
            text = written(chance, made)
            found = levels(made)
            self.assertEqual(depth(text), found)
            self.assertFalse(is_deeper(text, found))
            self.assertTrue(found == 0 or is_deeper(text, found - 1))
            self.assertEqual(finish(JsonText(text).skip(0, found)), len(text))
            if found:
                with self.assertRaises(TooDeep):
                    finish(JsonText(text).skip(0, found - 1))

    def test_elements_and_members(self) -> None:
        chance = random.Random(9)
        for _ in range(1500):
            items = [document(chance, 3) for _ in range(chance.randrange(6))]
            walk = JsonText(b" " + written(chance, items) + b" x")
            found = [json.loads(each.copy()) for each in walk.elements(1) if each is not None]
            self.assertEqual(repr(found), repr(items))
            self.assertEqual(walk.text[walk.at :], b" x")
            made = {f'{number}\\"é{number}': item for number, item in enumerate(items)}
            walk = JsonText(b" " + written(chance, made) + b" x")
            members = [each for each in walk.members(1) if each is not None]
            self.assertEqual(repr({m.key: json.loads(m.value.copy()) for m in members}), repr(made))
            self.assertTrue(all(walk.text[member.start : member.start + 1] == b'"' for member in members))
            self.assertEqual(walk.text[walk.at :], b" x")

    def test_windows_cut_nothing(self) -> None:
        """Escapes, strings and depth go on from one window to the next, wherever it ends."""
        for pad in (*range(40, 70), *range(330, 350), *range(STEP_BYTES + 5430, STEP_BYTES + 5470)):
            filler = b"x" * pad
            for inner, deep in (
                (b'["%b[[[[]]]", [[]]]', 3),
                (b'["%b\\"[[[[", "]", [[]]]', 3),
                (b'["%b\\\\", [[]]]', 3),
                (b'["%b\\\\\\"]]", [[]]]', 3),
                (b'["%b\\\\\\\\\\\\\\\\\\\\\\\\", [[]]]', 3),
                (b'[["\\u00e9%b\\n"],[]]', 2),
            ):
                text = inner % filler
                self.assertEqual(finish(JsonText(text + b"]").skip(0, deep)), len(text))
                self.assertEqual(levels(json.loads(text)), deep)
                with self.assertRaises(TooDeep):
                    finish(JsonText(text).skip(0, deep - 1))

    def test_a_long_key_is_none_that_is_known(self) -> None:
        text = b'{"\\ud800": 1, "%b": 2, "a": 3}' % (b"k" * 300)
        found = [member.key for member in JsonText(text).members(0) if member is not None]
        self.assertEqual(found, [None, None, "a"])

    def test_members_are_counted(self) -> None:
        for count, error in ((MAX_MEMBERS, None), (MAX_MEMBERS + 1, TooMany)):
            members = JsonText(b"{" + b",".join([b'"":0'] * count) + b"}").members(0)
            if error is None:
                self.assertEqual(sum(member is not None for member in members), count)
            else:
                with self.assertRaises(error):
                    list(members)

    def test_what_is_no_json_is_malformed(self) -> None:
        for text in (b"", b"[", b"{", b'"', b'["', b'"\\', b'"\\"', b"x", b"nul", b"1.", b"-", b"1" * 9000):
            with self.subTest(text[:9]), self.assertRaises(Malformed):
                finish(JsonText(text).skip(0))
        for text in (b"[", b"[1", b"[1,", b"[1,]", b"[,1]", b"[1 2]", b"[1}"):
            with self.subTest(text), self.assertRaises(Malformed):
                list(JsonText(text).elements(0))

    @given(st.text('[]{}"\\,:1 \0', max_size=80).map(str.encode), st.integers(0, 6))
    @settings(derandomize=True, deadline=None, max_examples=300)
    def test_whatever_comes_it_ends(self, text: bytes, most: int) -> None:
        for walk in (
            lambda: finish(JsonText(text).skip(0, most)),
            lambda: list(JsonText(text).elements(0, most)),
            lambda: list(JsonText(text).members(0, most)),
        ):
            with contextlib.suppress(Malformed, TooDeep):
                walk()
        depth(text)


class StepsTest(unittest.TestCase):
    """Between two steps no more is read than a step's bytes and one window: work is counted, not time."""

    SIZE = 1 << 20

    def most_between_steps(self, patterns: tuple[bytes, bytes, bytes]) -> tuple[int, int]:
        """Return the most bytes that were split between two steps, and those of all steps."""
        head, unit, tail = patterns
        text = head + unit * (self.SIZE // len(unit)) + tail
        read = [0]
        split = json_text._between_quotes

        def counted(window: bytes) -> list[bytes]:
            read[-1] += len(window)
            return split(window)

        with patch.object(json_text, "_between_quotes", counted):
            steps = JsonText(text).skip(0, 10**9)
            try:
                while True:
                    next(steps)
                    read.append(0)
            except StopIteration as end:
                self.assertEqual(end.value, len(text))
        return max(read), sum(read)

    def test_hostile_text_is_read_in_steps(self) -> None:
        for patterns in (
            (b'"', b"x", b'"'),
            (b'"', b"\\\\", b'"'),
            (b'"', b'\\"', b'"'),
            (b'"', b"\\u0000", b'"'),
            (b"[0", b",[]", b"]"),
            (b"[0", b",[[[[[[[[]]]]]]]]", b"]"),
            (b"[0", b',""', b"]"),
            (b"[0", b',{"":[]}', b"]"),
            (b"[0", b",1", b"]"),
            (b"[0", b',"]["', b"]"),
            (b"[0", b" ", b"]"),
            (b'{"a":0', b',"\\\\":{}', b"}"),
        ):
            with self.subTest(patterns):
                most, total = self.most_between_steps(patterns)
                self.assertLess(most, 3 * STEP_BYTES)
                self.assertLess(total, 1.2 * self.SIZE, "nothing is read again and again")

    def test_space_and_items_are_steps_too(self) -> None:
        spaces = b"[" + b" " * self.SIZE + b"]"
        self.assertGreaterEqual(sum(1 for _ in JsonText(spaces).elements(0)), self.SIZE // STEP_BYTES)
        tiny = JsonText(b"[" + b",".join([b"0"] * 10_000) + b"]").elements(0)
        self.assertGreaterEqual(sum(item is None for item in tiny), 10_000 // 64)


if __name__ == "__main__":
    unittest.main()
