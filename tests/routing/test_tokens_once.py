"""A chat is tokenized once: P tells its tokens, and D gets them, where it reads them and that pays."""

import json
from collections.abc import Mapping
from typing import Any

from tests.support.routing import PARAMS, Case, answer, decode_body
from vllm_pd_scheduler.handoff.interfaces import PrefillAnswer
from vllm_pd_scheduler.request.api import CHAT, COMPLETIONS, Api
from vllm_pd_scheduler.request.body import JsonBody
from vllm_pd_scheduler.routing.tokens_once import MAX_BYTES, MIN_BYTES, tokens_once

IDS = [7, 8, 9]
TEXT = "word " * (MIN_BYTES // 5 + 1)
SAID = PARAMS | {"transfer_mode": "pull"}


def chat(content: Any = TEXT, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": content}], **more}


def told(ids: Any = IDS, params: Any = SAID) -> PrefillAnswer:
    usage = {"prompt_tokens": len(IDS)}
    found = {"usage": usage, "prompt_token_ids": ids, "kv_transfer_params": params}
    return answer(body=json.dumps(found).encode())


def test_where_it_pays() -> None:
    def pays(content: Any = TEXT, api: Api = CHAT, **more: Any) -> bool:
        return tokens_once(JsonBody.parse(json.dumps(chat(content, **more)).encode(), api))

    assert pays()
    assert pays(content=[{"type": "text", "text": TEXT}])
    assert not pays(api=COMPLETIONS)
    assert not pays(content="short")
    assert not pays(padding="x" * MAX_BYTES)
    for kind in ("image_url", "input_audio", "audio_url", "video_url", "image_embeds", "file"):
        assert not pays(content=[{"type": "text", "text": TEXT}, {"type": kind, kind: {"url": "data:,"}}])


class TokensOnceTest(Case):
    CONFIG: Mapping[str, Any] = {"max_retries": 2}

    def setUp(self) -> None:
        super().setUp()
        self.leg.answers = dict.fromkeys(("p0", "p1", "p2"), told())

    async def known(self) -> None:
        """Let each P show that its D reads token ids."""
        for _ in range(3):
            (await self.route(chat(), CHAT.path)).release()

    def asked(self) -> list[bool]:
        return ["return_token_ids" in body for _, _, _, body in self.leg.sent]

    async def test_d_gets_them_once_p_has_shown_what_it_is(self) -> None:
        await self.known()
        self.assertEqual(self.asked(), [False] * 3)
        forward = await self.route(chat(), CHAT.path)
        self.assertTrue(self.asked()[-1])
        expected = chat(kv_transfer_params=SAID | {"prompt_token_ids": IDS})
        self.assertEqual(decode_body(forward, chat()), expected)
        self.assertEqual(
            forward.pending.handoff.token_ids, b"", "it is not kept for as long as the answer takes"
        )

    async def test_a_p_of_an_older_release_is_never_asked(self) -> None:
        self.leg.answers = dict.fromkeys(("p0", "p1", "p2"), told(params=PARAMS))
        for _ in range(3):
            await self.known()
        self.assertEqual(self.asked(), [False] * 9)

    async def test_it_can_be_turned_off(self) -> None:
        self.CONFIG = {"tokenize_once": False}
        self.setUp()
        for _ in range(2):
            await self.known()
        self.assertEqual(self.asked(), [False] * 6)

    async def test_a_p_that_does_not_tell_them_is_as_good(self) -> None:
        await self.known()
        self.leg.answers = dict.fromkeys(("p0", "p1", "p2"), told(None))
        forward = await self.route(chat(), CHAT.path)
        self.assertEqual(decode_body(forward, chat()), chat(kv_transfer_params=SAID))

    async def test_what_does_not_fit_with_them_goes_without(self) -> None:
        await self.known()
        size = len(json.dumps(chat(kv_transfer_params=SAID)))
        self.router.config.__dict__["max_body_bytes"] = size
        forward = await self.route(chat(), CHAT.path)
        self.assertEqual(decode_body(forward, chat()), chat(kv_transfer_params=SAID))
        self.router.config.__dict__["max_body_bytes"] = size - 100
        self.assertIsNone((await self.route(chat(), CHAT.path)).prefill)
