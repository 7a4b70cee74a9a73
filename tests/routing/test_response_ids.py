"""Who keeps a response: its id says so, whichever scheduler has made it."""

import json
import re
from typing import Any

from tests.support.routing import PARAMS, Case, decode_body

BODY = {"model": "m", "input": "x"}
PATH = "/v1/responses"


class ResponseIdsTest(Case):
    async def respond(self, **more: Any) -> tuple[Any, dict[str, Any]]:
        body = {**BODY, **more}
        forward = await self.route(body, PATH)
        sent = decode_body(forward, body)
        forward.release()
        return forward, sent

    async def keeper(self, path: str, method: str = "GET") -> list[str]:
        """Who is asked for something of a response, one after another."""
        found = []
        for _ in range(3):
            forward = await self.route(b"", path, method)
            found.append(forward.decode[0].id)
            forward.release()
        return found

    async def test_an_id_goes_with_the_hand_off_and_says_which_d_it_is(self) -> None:
        forward, sent = await self.respond()
        self.assertEqual(sent["kv_transfer_params"], PARAMS)
        self.assertRegex(sent["request_id"], r"^resp_pd[0-9a-f]{32}$")
        name = forward.decode[0].id
        for path in (f"{PATH}/{sent['request_id']}", f"{PATH}/{sent['request_id']}/cancel"):
            self.assertEqual(await self.keeper(path), [name] * 3)
        other, again = await self.respond()
        self.assertNotEqual(sent["request_id"], again["request_id"])
        self.assertNotEqual(other.decode[0].id, name, "round robin")

    async def test_a_body_at_the_limit_gets_none(self) -> None:
        """Envoy would answer 413 in D's place."""
        self.router.config.__dict__["max_body_bytes"] = limit = 2048
        for disaggregation in ("always", "never"):
            self.router.config.__dict__["disaggregation"] = disaggregation
            names = set()
            for size in range(1500, limit + 1, 10):
                body = {**BODY, "pad": ""}
                body["pad"] = "x" * (size - len(json.dumps(body)))
                forward = await self.route(body, PATH)
                sent = json.dumps(body).encode()
                sent = sent if forward.splice is None else forward.splice.into(sent)
                self.assertLessEqual(len(sent), limit)
                names.add("request_id" in json.loads(sent))
                forward.release()
            self.assertEqual(names, {True, False})

    async def test_the_next_turn_goes_where_the_last_is_kept(self) -> None:
        forward, sent = await self.respond()
        for _ in range(3):
            following, turn = await self.respond(previous_response_id=sent["request_id"])
            self.assertEqual(following.decode[0], forward.decode[0])
            self.assertIsNone(following.prefill, "only its D knows what was said before")
            self.assertRegex(turn["request_id"], r"^resp_pd")
            self.assertNotIn("kv_transfer_params", turn)

    async def test_also_if_it_is_full(self) -> None:
        forward, sent = await self.respond()
        self.router.registry.ends.overloaded(forward.decode[0], self.router._core._clock(), 30.0)
        following, _ = await self.respond(previous_response_id=sent["request_id"])
        self.assertEqual(following.decode[0], forward.decode[0])

    async def test_also_while_it_drains(self) -> None:
        forward, sent = await self.respond()
        self.router.drain_instance(forward.decode[0].id)
        self.assertEqual(await self.keeper(f"{PATH}/{sent['request_id']}"), [forward.decode[0].id] * 3)

    async def test_one_that_is_gone_or_was_never_there(self) -> None:
        forward, sent = await self.respond()
        self.router.unregister_instance(forward.decode[0].id)
        for name in (
            sent["request_id"],
            "resp_pd0123456789abcdef0123456789abcdef",
            "resp_x",
            "resp_pd" + "A" * 32,
        ):
            self.assertGreater(len(set(await self.keeper(f"{PATH}/{name}"))), 1, "any may say so")

    async def test_a_response_that_has_a_name_or_is_not_kept(self) -> None:
        _, sent = await self.respond(request_id="mine")
        self.assertEqual(sent["request_id"], "mine")
        _, sent = await self.respond(store=False)
        self.assertNotIn("request_id", sent)

    async def test_one_that_is_not_split_has_an_id_too(self) -> None:
        _, sent = await self.respond(background=True)
        self.assertRegex(sent["request_id"], r"^resp_pd")
        self.assertNotIn("kv_transfer_params", sent)

    async def test_no_other_request_is_named(self) -> None:
        forward = await self.route({"model": "m", "messages": []}, "/v1/messages")
        self.assertNotIn(b"resp_pd", forward.splice.text)
        forward.release()

    async def test_the_body_stays_json(self) -> None:
        for raw in (b'{"input":"x"}', b'{ "input" : "x" } ', b'{"input":"x","kv_transfer_params":{"a":"}"}}'):
            forward = await self.route(raw, PATH)
            body = raw if forward.body is None else forward.body
            self.assertIn("request_id", json.loads(forward.splice.into(body)))
            forward.release()

    async def test_ids_are_short_and_plain(self) -> None:
        _, sent = await self.respond()
        self.assertTrue(re.fullmatch(r"[a-z0-9_]{39}", sent["request_id"]))
