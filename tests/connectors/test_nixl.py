"""NIXL: bodies of both legs, what can be split, and which answers of prefill decode survives."""

import json
import unittest
from functools import reduce
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.support.connectors import LEGS
from vllm_pd_scheduler.connectors import Handoff, NixlConnector
from vllm_pd_scheduler.connectors.base import MAX_TOKENS
from vllm_pd_scheduler.request.body import JsonBody

# As vLLM 0.33 answers a prefill request, key for key.
PARAMS: dict[str, Any] = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[1, 2, 3]],
    "remote_engine_id": "8d2c6e0a-b1f7-4f2c-9d7b-0f6f3c1f9c11",
    "remote_request_id": "cmpl-5d1b",
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
    "tp_size": 1,
    "dcp_size": 1,
    "pp_size": 1,
    "remote_num_tokens": 283,
    "remote_blocks_expiry_time": None,
    "remote_registration_generation": 1,
    "transfer_mode": "pull",
    "remote_prefill_cached_tokens": 0,
}
ANSWER: dict[str, Any] = {
    "id": "cmpl-5d1b",
    "object": "text_completion",
    "choices": [{"index": 0, "text": " a", "finish_reason": "length"}],
    "usage": {"prompt_tokens": 283, "total_tokens": 284, "completion_tokens": 1},
    "kv_transfer_params": PARAMS,
}


def spliced(request: JsonBody, handoff: Handoff) -> bytes:
    return NixlConnector().splice(request, handoff).into(request.raw)


CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "你好"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "你好"}

HUGE = int("9" * 400)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(HUGE) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)

nixl = NixlConnector()


def body(fields: dict[str, Any]) -> JsonBody:
    return JsonBody.parse(json.dumps(fields).encode())


class CanSplitTest(unittest.TestCase):
    def test_each(self) -> None:
        cases: list[tuple[bool, dict[str, Any]]] = [
            (True, TEXT),
            (True, CHAT),
            (True, {}),  # nothing there to go wrong: prefill answers 400
            (True, TEXT | {"stream": True, "stream_options": {"include_usage": True}}),
            (True, TEXT | {"n": 1, "best_of": 1}),
            (True, TEXT | {"n": None, "best_of": None}),
            (False, TEXT | {"n": 2}),
            (False, CHAT | {"n": 2}),
            (False, TEXT | {"n": "2"}),
            (False, TEXT | {"best_of": 3}),
            (False, TEXT | {"use_beam_search": True}),
            (True, TEXT | {"use_beam_search": False}),
            (False, TEXT | {"echo": True}),
            (True, TEXT | {"echo": False}),
            (True, TEXT | {"echo": None}),
            (False, TEXT | {"prompt_logprobs": 0}),
            (True, TEXT | {"prompt_logprobs": None}),
            (True, TEXT | {"logprobs": 5}),
            (False, TEXT | {"prompt_embeds": "AAAA"}),
            # prompts: one text or one list of token ids can be split, several cannot
            (True, {"prompt": [1, 2, 3]}),
            (False, {"prompt": ["a", "b"]}),
            (True, {"prompt": ["a"]}),
            (False, {"prompt": [[1, 2], [3]]}),
            (True, {"prompt": [[1, 2]]}),
            (False, {"prompt": [{"prompt": "a"}]}),
            # what is too long to be read is not sure to be harmless
            (False, TEXT | {"n": [1] * 5000}),
            (False, TEXT | {"echo": " " * 5000}),
            (False, {"prompt": []}),
            (True, {"prompt": ""}),
            (True, {"prompt": None}),
        ]
        for expected, fields in cases:
            with self.subTest(fields):
                self.assertEqual(nixl.can_split(body(fields)), expected)


class PrefillBodyTest(unittest.TestCase):
    def test_completion(self) -> None:
        sent = json.loads(
            nixl.prefill_body(
                body(
                    TEXT
                    | {
                        "max_tokens": 100,
                        "min_tokens": 10,
                        "stream": True,
                        "stream_options": {"include_usage": True},
                        "temperature": 0.0,
                        "stop": ["x"],
                    }
                ),
                LEGS,
            )
        )
        self.assertEqual(
            sent,
            TEXT
            | {
                "temperature": 0.0,
                "stop": ["x"],
                "max_tokens": 1,
                "stream": False,
                "kv_transfer_params": {
                    "do_remote_decode": True,
                    "do_remote_prefill": False,
                    "remote_engine_id": None,
                    "remote_block_ids": None,
                    "remote_host": None,
                    "remote_port": None,
                },
            },
        )

    def test_chat_has_a_second_limit_when_the_client_set_it(self) -> None:
        self.assertNotIn("max_completion_tokens", json.loads(nixl.prefill_body(body(CHAT), LEGS)))
        sent = json.loads(nixl.prefill_body(body(CHAT | {"max_completion_tokens": 50, "tools": []}), LEGS))
        self.assertEqual((sent["max_completion_tokens"], sent["max_tokens"]), (1, 1))
        self.assertEqual((sent["messages"], sent["tools"]), (CHAT["messages"], []))

    def test_the_client_is_not_heard_on_the_hand_off(self) -> None:
        raw = body(TEXT | {"kv_transfer_params": {"do_remote_prefill": True}})
        self.assertIs(
            json.loads(nixl.prefill_body(raw, LEGS))["kv_transfer_params"]["do_remote_decode"], True
        )

    def test_unusual_numbers_and_letters_pass_as_they_are_written(self) -> None:
        raw = JsonBody.parse(b'{"prompt": "\\u4f60", "temperature": 1.10, "seed": 18446744073709551617}')
        sent = nixl.prefill_body(raw, LEGS)
        for text in (b'"\\u4f60"', b":1.10,", b":18446744073709551617,"):
            self.assertIn(text, sent)


IDS = list(range(283))


class TokenIdsTest(unittest.TestCase):
    """P tells the prompt's tokens, and D reads them: where P says who moves the blocks, D can."""

    def found(self, ids: Any, **params: Any) -> Handoff:
        raw = {**ANSWER, "prompt_token_ids": ids, "kv_transfer_params": PARAMS | params}
        found = nixl.handoff(json.dumps(raw).encode(), LEGS)
        assert found is not None
        return found

    def test_p_is_asked_for_them(self) -> None:
        legs = replace(LEGS, token_ids=True)
        for more in ({}, {"return_token_ids": False}):
            sent = json.loads(nixl.prefill_body(body(CHAT | more), legs))
            self.assertIs(sent["return_token_ids"], True)
        self.assertNotIn("return_token_ids", json.loads(nixl.prefill_body(body(CHAT), LEGS)))

    def test_d_gets_them_with_the_hand_off(self) -> None:
        sent = json.loads(spliced(body(CHAT), self.found(IDS)))
        self.assertEqual(sent, CHAT | {"kv_transfer_params": PARAMS | {"prompt_token_ids": IDS}})

    def test_the_release_has_them_not(self) -> None:
        self.assertNotIn(b"prompt_token_ids", nixl.release_body(self.found(IDS), "m"))

    def test_what_is_no_list_of_them_is_left_out(self) -> None:
        """D would answer 400, or decode another prompt."""
        short = IDS[:-1]
        others = [[*short, last] for last in (-1, 1.5, None, [1], "1", True)]
        for ids in (None, [], "1", 1, {}, short, [*IDS, 1], [IDS], *others):
            with self.subTest(str(ids)[-30:]):
                self.assertEqual(self.found(ids).token_ids, b"")
        self.assertEqual(json.loads(self.found(IDS).token_ids), IDS)

    def test_releases_that_would_not_read_them(self) -> None:
        found = self.found(IDS, transfer_mode=None)
        self.assertEqual((found.token_ids, found.takes_token_ids), (b"", False))
        self.assertTrue(self.found(None).takes_token_ids)


class HandoffTest(unittest.TestCase):
    def handoff(self, params: Any, **more: Any) -> Handoff | None:
        return nixl.handoff(json.dumps({**ANSWER, **more, "kv_transfer_params": params}).encode(), LEGS)

    def test_it_is_copied_whole(self) -> None:
        raw = json.dumps(ANSWER, indent=1).encode()
        found = nixl.handoff(raw, LEGS)
        assert found is not None
        self.assertEqual(found.prompt_tokens, 283)
        self.assertIn(found.params, raw)
        sent = json.loads(spliced(body(TEXT | {"max_tokens": 9, "stream": True}), found))
        self.assertEqual(sent, TEXT | {"max_tokens": 9, "stream": True, "kv_transfer_params": PARAMS})

    def test_keys_of_a_later_release_pass(self) -> None:
        found = self.handoff(PARAMS | {"remote_tp_rank": 3, "more": {"deep": [1]}})
        assert found is not None
        self.assertEqual(json.loads(found.params)["more"], {"deep": [1]})

    def test_releases_that_do_not_say_who_moves_the_blocks(self) -> None:
        older = {key: value for key, value in PARAMS.items() if key != "transfer_mode"}
        self.assertIsNotNone(self.handoff(older))
        self.assertIsNotNone(self.handoff(PARAMS | {"transfer_mode": None}))

    def test_a_hand_off_that_is_pushed_is_another_connectors(self) -> None:
        """P would look for the client's request id, which another request may have too."""
        with self.assertRaisesRegex(ValueError, "'push', so this is not its connector"):
            self.handoff(PARAMS | {"transfer_mode": "push"})

    def test_several_groups_of_blocks(self) -> None:
        self.assertIsNotNone(self.handoff(PARAMS | {"remote_block_ids": [[1, 2], [], [3]]}))

    def test_the_form_of_older_releases(self) -> None:
        """A flat list of blocks and no request id: D of the same release reads just that."""
        older = {key: value for key, value in PARAMS.items() if key != "remote_request_id"}
        self.assertIsNotNone(self.handoff(older | {"remote_block_ids": [1, 2, 3]}))
        self.assertIsNone(self.handoff(older), "grouped blocks come with a request id")

    def test_what_a_decode_engine_would_die_of_is_no_hand_off(self) -> None:
        required = ("do_remote_prefill", "remote_block_ids", "remote_engine_id", "remote_request_id")
        for key in (*required, "remote_host", "remote_port"):
            with self.subTest("missing", key=key):
                self.assertIsNone(self.handoff({k: v for k, v in PARAMS.items() if k != key}))
            with self.subTest("null", key=key):
                self.assertIsNone(self.handoff(PARAMS | {key: None}))
        for change in (
            {"do_remote_prefill": False},
            {"do_remote_prefill": "true"},
            {"remote_block_ids": []},
            {"remote_block_ids": [[]]},
            {"remote_block_ids": [["1", "2"]]},
            {"remote_block_ids": "1,2,3"},
            {"remote_host": ""},
            {"remote_host": "x" * 2000},
            {"remote_engine_id": ""},
            {"remote_port": "5600"},
            {"remote_port": 0},
            {"remote_port": -5600},
            {"remote_port": 65536},
            {"remote_port": 5600.5},
            {"remote_port": True},
            {"remote_block_ids": [[-1]]},
            {"remote_block_ids": [[1 << 31]]},
            {"remote_block_ids": [[HUGE]]},
            {"remote_block_ids": [HUGE]},
            {"remote_block_ids": [[1.5]]},
            {"remote_block_ids": [[True]]},
            {"remote_block_ids": {"0": [1]}},
            {"remote_num_tokens": HUGE},
            {"remote_num_tokens": -1},
            {"tp_size": 0},
            {"tp_size": -8},
            {"pp_size": HUGE},
            {"dcp_size": "1"},
            {"more": reduce(lambda inner, _: [inner], range(60), [])},
        ):
            with self.subTest(str(change)[:60]):
                self.assertIsNone(self.handoff(PARAMS | change))

    def test_text_that_is_none_is_no_hand_off(self) -> None:
        """The parts that nobody reads here are copied to D as they are."""
        raw = json.dumps(ANSWER).encode().replace(b'"pull"', b'"\xff"')
        self.assertIsNone(nixl.handoff(raw, LEGS))

    @given(st.data())
    @settings(derandomize=True, deadline=None, max_examples=300)
    def test_junk_is_no_hand_off_or_one_that_can_be_sent(self, data: st.DataObject) -> None:
        params: Any = PARAMS
        for _ in range(data.draw(st.integers(0, 2))):
            params = params | {data.draw(st.sampled_from(sorted(PARAMS))): data.draw(json_values)}
        answer: Any = {**ANSWER, "kv_transfer_params": data.draw(st.just(params) | json_values)}
        answer["usage"] = data.draw(st.just(ANSWER["usage"]) | json_values)
        raw = bytearray(json.dumps(answer).encode())
        for _ in range(data.draw(st.integers(0, 2))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        try:
            found = nixl.handoff(bytes(raw), LEGS)
        except ValueError:  # another transfer_mode
            return
        if found is None:
            return
        for count in (found.prompt_tokens, found.cached_tokens):
            self.assertTrue(count is None or 0 <= count <= MAX_TOKENS)
        sent = json.loads(spliced(body(TEXT), found))["kv_transfer_params"]
        self.assertIs(sent["do_remote_prefill"], True)
        self.assertTrue(sent["remote_host"] and sent["remote_engine_id"] and sent["remote_block_ids"])

    def test_answers_without_one(self) -> None:
        for params in (None, {}, [], "x", 5, True, {"do_remote_prefill": True}):
            with self.subTest(params):
                self.assertIsNone(self.handoff(params))
        without = {key: value for key, value in ANSWER.items() if key != "kv_transfer_params"}
        deep = b'{"kv_transfer_params":' + b"[" * 100_000
        for raw in (json.dumps(without).encode(), b"", b"null", b"[]", b"Bad Gateway", b"\xff", deep):
            with self.subTest(raw[:30]):
                self.assertIsNone(nixl.handoff(raw, LEGS))

    def test_usage_is_not_needed(self) -> None:
        """It is there to learn from; whatever it says, the hand-off is not lost by it."""
        for tokens in (None, "283", 283.5, -1, 0, True, HUGE, [1]):
            for usage in (tokens, {"prompt_tokens": tokens}, {"prompt_tokens_details": tokens}):
                with self.subTest(str(usage)[:60]):
                    found = self.handoff(PARAMS, usage=usage)
                    assert found is not None
                    self.assertIsNone(found.prompt_tokens)
        self.assertIsNotNone(self.handoff(PARAMS | {"remote_prefill_cached_tokens": HUGE}))

    def test_what_was_cached(self) -> None:
        """As the hand-off says it, else as usage does; never more than there is."""
        without = {key: value for key, value in PARAMS.items() if key != "remote_prefill_cached_tokens"}
        for cached, details, expected in (
            (100, None, 100),
            (None, {"cached_tokens": 200}, 200),
            (100, {"cached_tokens": 200}, 100),
            (500, None, 283),
            (-1, {"cached_tokens": 200}, 200),
            (HUGE, None, None),
            (None, {"cached_tokens": HUGE}, None),
        ):
            with self.subTest(cached=str(cached)[:9], details=str(details)[:30]):
                params = without if cached is None else without | {"remote_prefill_cached_tokens": cached}
                usage = {"prompt_tokens": 283, "prompt_tokens_details": details}
                if details == {"cached_tokens": HUGE}:
                    usage = {"prompt_tokens_details": details}
                found = self.handoff(params, usage=usage)
                assert found is not None
                self.assertEqual(found.cached_tokens, expected)


if __name__ == "__main__":
    unittest.main()
