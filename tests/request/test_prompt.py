import gc
import json
from collections.abc import Sequence
from typing import Any
from unittest import TestCase
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from tests.request.documents import in_steps
from vllm_pd_scheduler.request import prompt as prompt_module
from vllm_pd_scheduler.request.body import JsonBody
from vllm_pd_scheduler.request.chat import MAX_ITEMS, MAX_MEDIA, MEDIA_BYTES
from vllm_pd_scheduler.request.errors import BodyError
from vllm_pd_scheduler.request.json_text import AT_ONCE_BYTES, MAX_MEMBERS, finish
from vllm_pd_scheduler.request.prompt import BLOCK_BYTES, Prompt

LONG = "".join(f"Sentence {number} of a long text. " for number in range(200))
NOTHING = Prompt(0, None, ())


def read_prompt(body: JsonBody) -> Prompt:
    return finish(prompt_module.read_prompt(body))


def read(**fields: Any) -> Prompt:
    return read_prompt(JsonBody.parse(json.dumps({"model": "m", **fields}).encode()))


def read_in_steps(**fields: Any) -> Prompt:
    """Read a prompt of any size as those that are too long to be decoded at once."""
    raw = json.dumps({"model": "m", **fields}, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
    with in_steps():
        return read_prompt(JsonBody.parse(raw.encode()))


def chat(*messages: dict[str, Any], **fields: Any) -> Prompt:
    return read(messages=list(messages), **fields)


def user(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


def shared(one: Prompt, other: Prompt) -> int:
    """Return how many leading blocks two prompts share, having checked that they share no others."""
    same = [a == b for a, b in zip(one.blocks, other.blocks, strict=False)]
    count = same.index(False) if False in same else len(same)
    assert len(set(one.blocks) & set(other.blocks)) == count
    return count


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).map(lambda text: text * 60)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.none() | texts},
        optional={
            "name": st.text("ab", max_size=3),
            "tool_call_id": st.text("12", max_size=2),
            "tool_calls": st.lists(st.dictionaries(st.text("xy", max_size=2), st.integers())),
        },
    ),
    max_size=5,
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["type", "text", "role", "content"]), inner)
    ),
)


class TextTest(TestCase):
    def test_a_prompt_has_its_bytes_and_its_whole_blocks(self) -> None:
        prompt = read(prompt="é" * BLOCK_BYTES)
        self.assertEqual((prompt.size, prompt.tokens, len(prompt.blocks)), (2 * BLOCK_BYTES, None, 2))
        self.assertEqual(len(read(prompt="a" * (BLOCK_BYTES - 1)).blocks), 0)
        self.assertTrue(all(0 <= block < 1 << 60 for block in prompt.blocks))

    def test_how_the_json_is_written_does_not_matter(self) -> None:
        plain = JsonBody.parse(('{"model":"m","prompt":"' + "é/" * 999 + '"}').encode())
        escaped = JsonBody.parse(('{ "prompt" : "' + "\\u00e9\\/" * 999 + '", "model" :"\\u006d" }').encode())
        self.assertEqual(read_prompt(plain), read_prompt(escaped))

    @given(st.integers(0, len(LONG)), st.text(max_size=5))
    def test_texts_share_the_blocks_of_their_common_part(self, cut: int, tail: str) -> None:
        tail = "\n" + tail.encode(errors="replace").decode()
        count = shared(read(prompt=LONG), read(prompt=LONG[:cut] + tail))
        self.assertEqual(count, cut // BLOCK_BYTES)

    def test_another_model_another_salt_or_another_kind_shares_nothing(self) -> None:
        one = read(prompt="1," * 2000)
        others = [
            read(prompt="1," * 2000, model="adapter"),
            read(prompt="1," * 2000, cache_salt="tenant"),
            read(prompt="1," * 2000, model=None, cache_salt="m"),
            read(prompt=[1] * 2000),
            chat(user("1," * 2000)),
        ]
        self.assertEqual([shared(one, other) for other in others], [0] * len(others))
        self.assertEqual(one, read(prompt="1," * 2000, cache_salt=None, temperature=1, stream=True))

    def test_of_a_huge_prompt_the_first_part_is_read(self) -> None:
        with patch("vllm_pd_scheduler.request.prompt.MAX_BYTES", 5000):
            prompts = [read(prompt=LONG), read(prompt=[LONG, LONG]), chat(user(LONG))]
        self.assertEqual(
            [(prompt.size, len(prompt.blocks)) for prompt in prompts], [(5000, 4), (5000, 0), (5000, 4)]
        )

    def test_nothing_of_the_text_can_be_reached(self) -> None:
        prompt = chat(user(LONG), tools=[{"name": LONG}])
        reached: list[Any] = [prompt.size, prompt.tokens, prompt.blocks]
        self.assertEqual({type(part) for part in gc.get_referents(prompt)} - {type}, {int, tuple, type(None)})
        self.assertEqual({type(part) for part in gc.get_referents(*reached)}, {int})


class TokenIdsTest(TestCase):
    def test_tokens_are_counted_exactly(self) -> None:
        self.assertEqual(read(prompt=list(range(700))).tokens, 700)
        self.assertEqual(read(prompt=[7]).tokens, 1)
        self.assertEqual(read_in_steps(prompt=list(range(70_000))).tokens, 70_000)

    def test_white_space_does_not_matter(self) -> None:
        ids = list(range(2000))
        spaced = JsonBody.parse(json.dumps({"model": "m", "prompt": ids}, indent=3).encode())
        compact = JsonBody.parse(json.dumps({"model": "m", "prompt": ids}, separators=(",", ":")).encode())
        self.assertEqual(read_prompt(spaced), read_prompt(compact))
        self.assertGreater(len(read_prompt(compact).blocks), 5)

    @given(st.integers(0, 2000), st.integers(0, 99))
    def test_ids_share_the_blocks_of_their_common_part(self, cut: int, other: int) -> None:
        ids = list(range(100_000, 102_000))
        count = shared(read(prompt=ids), read(prompt=[*ids[:cut], other]))
        self.assertEqual(count, 7 * cut // BLOCK_BYTES)

    def test_one_prompt_in_a_list_is_that_prompt(self) -> None:
        for prompt in (LONG, "short", list(range(3000)), [7], LONG * 10, list(range(70_000))):
            self.assertEqual(read(prompt=[prompt]), read(prompt=prompt))
            self.assertEqual(read_in_steps(prompt=[prompt]), read(prompt=prompt))

    def test_several_prompts_have_no_blocks(self) -> None:
        for prompts in ([LONG, LONG], [[1, 2], [3]], [], [{}]):
            prompt = read(prompt=prompts)
            self.assertEqual((prompt.tokens, prompt.blocks), (None, ()))
            self.assertGreater(prompt.size, 0)


class ChatTest(TestCase):
    @given(messages, messages, st.booleans())
    def test_the_next_turn_extends_this_one(
        self, turn: list[dict[str, Any]], more: list[dict[str, Any]], with_tools: bool
    ) -> None:
        tools = [{"type": "function", "function": {"name": LONG}}] if with_tools else None
        first = read(messages=turn, tools=tools)
        second = read(messages=turn + more, tools=tools)
        self.assertEqual(second.blocks[: len(first.blocks)], first.blocks)
        self.assertEqual(second == first, not more)

    @given(messages, messages)
    def test_chats_that_differ_do_not_agree_at_their_ends(
        self, one: list[dict[str, Any]], other: list[dict[str, Any]]
    ) -> None:
        def essence(turn: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [{key: value for key, value in message.items() if value} for message in turn]

        pad = "x" * BLOCK_BYTES
        first, second = (chat(*turn, user(pad), user(pad)) for turn in (one, other))
        self.assertEqual(first.blocks[-1] == second.blocks[-1], essence(one) == essence(other))

    def test_a_common_start_of_a_message_is_shared(self) -> None:
        count = shared(chat(user(LONG + "What is it?")), chat(user(LONG + "Who said so, and why?")))
        self.assertEqual(count, len(LONG) // BLOCK_BYTES)

    def test_text_is_the_same_as_a_string_and_as_parts(self) -> None:
        string = chat(user(f"{LONG}\n{LONG}"))
        for parts in (
            [{"type": "text", "text": f"{LONG}\n{LONG}"}],
            [{"type": "text", "text": LONG}, {"text": LONG, "type": "text"}],
            [LONG, {"text": LONG}],
        ):
            self.assertEqual(chat(user(parts)), string)

    def test_key_order_and_unread_fields_do_not_matter(self) -> None:
        tool = {"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": [LONG, None]}}}
        swapped = {"function": {"parameters": {"a": [LONG, None], "b": 1}, "name": "f"}, "type": "function"}
        call = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
        one = chat(user(LONG, tool_calls=[call]), tools=[tool])
        other = chat(
            {"tool_calls": [dict(reversed(call.items()))], "content": LONG, "x": [1], "role": "user"},
            tools=[swapped],
            temperature=0,
        )
        self.assertEqual(one, other)

    def test_what_is_empty_is_absent(self) -> None:
        bare = chat({"role": "user"}, user(LONG))
        for content in (None, "", []):
            empty = user(content, name=None, tool_calls=[], tool_call_id="")
            self.assertEqual(chat(empty, user(LONG), tools=[]), bare)

    def test_tools_come_before_the_messages(self) -> None:
        self.assertEqual(shared(chat(user(LONG)), chat(user(LONG), tools=[{"name": "f"}])), 0)
        with_tools = [chat(user(text), tools=[{"name": LONG}]) for text in "ab"]
        self.assertEqual(shared(*with_tools), len(LONG) // BLOCK_BYTES)


class MediaTest(TestCase):
    def image(self, data: str, **fields: str) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}", **fields}}

    def test_a_large_image_counts_as_any_other(self) -> None:
        sizes = [chat(user([self.image(data), LONG])).size for data in ("A", "A" * 1_000_000)]
        self.assertEqual(sizes[0], sizes[1])
        self.assertEqual(sizes[0] - chat(user([{"text": ""}, LONG])).size, MEDIA_BYTES)

    def test_the_same_image_is_shared_and_another_is_not(self) -> None:
        same = [chat(user([self.image("AAAA"), LONG + end])) for end in "xy"]
        self.assertEqual(shared(*same), (MEDIA_BYTES + len(LONG)) // BLOCK_BYTES)
        other = chat(user([self.image("AAAB"), LONG]))
        self.assertEqual(shared(same[0], other), 0)
        part = self.image("AAAA", detail="low")
        swapped = {
            key: dict(reversed(value.items())) if key == "image_url" else value for key, value in part.items()
        }
        self.assertEqual(chat(user([part])), chat(user([swapped])))

    def test_no_number_of_parts_is_too_large(self) -> None:
        for count in (MAX_MEDIA, MAX_MEDIA + 1, 100_000):
            prompt = chat(user([{}] * count))
            self.assertEqual(len(prompt.blocks), MAX_MEDIA * MEDIA_BYTES // BLOCK_BYTES)


class LongTest(TestCase):
    """What is too long to be decoded at once is the same prompt, and shares what it shares."""

    LONGER = LONG * 8  # 50 KB

    @given(messages, st.booleans())
    def test_a_chat(self, turn: list[dict[str, Any]], with_tools: bool) -> None:
        tools = [{"type": "function"}, {"name": "f"}] if with_tools else None
        turn = [*turn, user([{"type": "text", "text": LONG}, "x", {"text": "y"}, {"a": 1}])]
        self.assertEqual(read_in_steps(messages=turn, tools=tools), read(messages=turn, tools=tools))

    @given(texts)
    def test_a_text(self, text: str) -> None:
        self.assertEqual(read_in_steps(prompt=text), read(prompt=text))

    def test_the_next_turn_extends_this_one(self) -> None:
        call = {"id": "1", "function": {"name": "write", "arguments": self.LONGER}}
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
        turn: list[dict[str, Any]] = [user(LONG)]
        before = chat(*turn)
        for more in (
            user("é" * 30_000),
            user([{"type": "text", "text": self.LONGER}, image]),
            {"role": "assistant", "tool_calls": [call, call]},
            {"role": "tool", "content": self.LONGER, "tool_call_id": "1"},
            user([LONG, {"type": "text", "text": "\\" * 50_000}]),
        ):
            turn.append(more)
            prompt = chat(*turn)
            self.assertEqual(prompt.blocks[: len(before.blocks)], before.blocks)
            self.assertGreater(len(prompt.blocks), len(before.blocks))
            before = prompt

    def test_what_is_longer_shares_its_beginning(self) -> None:
        for cut in (AT_ONCE_BYTES - 2000, AT_ONCE_BYTES + 2000):
            short, long = (read(prompt=self.LONGER[:length]) for length in (cut, len(self.LONGER)))
            self.assertEqual(shared(short, long), cut // BLOCK_BYTES)
            short, long = (chat(user(self.LONGER[:length])) for length in (cut, len(self.LONGER)))
            self.assertEqual(shared(short, long), len(short.blocks))

    def test_large_media_are_told_apart(self) -> None:
        def image(letter: str) -> dict[str, Any]:
            return {"type": "image_url", "image_url": {"url": "data:" + letter * 100_000}}

        one, same, other = (chat(user([image(letter), LONG])) for letter in "AAB")
        self.assertEqual(one, same)
        self.assertEqual(shared(one, other), 0)
        self.assertEqual(one.size, chat(user([{"type": "image_url"}, LONG])).size)

    def test_no_list_is_too_long(self) -> None:
        for prompt in (
            chat(*([{"role": "u"}] * (MAX_ITEMS + 5))),
            chat(user([""] * (MAX_ITEMS * 4))),
            chat(user("x"), tools=[{}] * (MAX_ITEMS * 4)),
        ):
            self.assertLessEqual(prompt.size, 4 * MAX_ITEMS)
            self.assertGreater(prompt.size, MAX_ITEMS)

    def test_what_is_malformed_is_nothing(self) -> None:
        filler = "x" * AT_ONCE_BYTES
        for messages in (
            [{"content": filler}],
            [{"role": filler, "content": "x"}],
            [{"role": 1, "content": filler}],
            [{"role": "user", "content": {"a": filler}}],
            [{"role": "user", "name": 1, "content": filler}],
            [filler],
            [{"role": "u", **dict.fromkeys(map(str, range(MAX_MEMBERS)), filler[:9])}],
            filler,
        ):
            self.assertEqual(read(messages=messages), NOTHING)
        self.assertEqual(read(prompt=LONG, model=filler), NOTHING)
        self.assertEqual(read(prompt=LONG, cache_salt=filler), NOTHING)


class MalformedTest(TestCase):
    def test_it_is_nothing(self) -> None:
        bodies: Sequence[dict[str, Any]] = (
            {},
            {"prompt": None},
            {"prompt": 5},
            {"prompt": {"a": 1}},
            {"messages": None},
            {"messages": {}},
            {"messages": [LONG]},
            {"messages": [{"content": LONG}]},
            {"messages": [user(5)]},
            {"messages": [user({"text": LONG})]},
            {"messages": [{"role": ["user"], "content": LONG}]},
            {"messages": [user(LONG, tool_calls={"a": 1})]},
        )
        for number, fields in enumerate(bodies):
            with self.subTest(number):
                self.assertEqual(read(**fields), NOTHING)

    def test_text_that_is_not_utf_8_is_nothing(self) -> None:
        for body in (b'{"prompt":"\xff"}', b'{"messages":[{"role":"user","content":"\xed\xa0\x80"}]}'):
            self.assertEqual(read_prompt(JsonBody.parse(body)), NOTHING)

    def test_a_name_that_is_none_is_no_name(self) -> None:
        self.assertEqual(read(prompt=LONG, model=[1]), read(prompt=LONG, model=None))

    @given(
        st.dictionaries(st.sampled_from(["model", "prompt", "messages", "tools", "cache_salt"]), anything),
        st.lists(
            st.fixed_dictionaries({"role": st.text(), "content": anything}, optional={"tool_calls": anything})
        ),
        st.booleans(),
    )
    def test_no_json_raises(self, fields: dict[str, Any], listed: list[Any], with_messages: bool) -> None:
        if with_messages:
            fields["messages"] = listed
        try:
            body = JsonBody.parse(json.dumps(fields).encode())
        except BodyError:  # a lone surrogate that is no JSON text
            return
        prompt = read_prompt(body)
        self.assertLessEqual(len(prompt.blocks) * BLOCK_BYTES, prompt.size)
        self.assertEqual(read_prompt(body), prompt)

    def test_deep_nesting_is_read(self) -> None:
        deep: Any = {"type": "image_url"}
        for _ in range(190):
            deep = {"a": deep}
        self.assertEqual(len(chat(user([deep])).blocks), MEDIA_BYTES // BLOCK_BYTES)
