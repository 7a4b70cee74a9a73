"""Requests go to instances that serve their model, with both legs and with every retry."""

import json
from collections.abc import Mapping
from typing import Any

from tests.support.routing import BODY, ERROR, PARAMS, Case, answer, decode_body
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.models import PDInstance
from vllm_pd_scheduler.request.errors import OwnAnswer
from vllm_pd_scheduler.request.rewrites import Rewrite, Target
from vllm_pd_scheduler.telemetry import Served

LORA = {**BODY, "model": "lora"}


class ModelsTest(Case):
    CONFIG: Mapping[str, Any] = {"max_retries": 3}

    def setUp(self) -> None:
        super().setUp()
        for endpoint in self.router.registry:
            self.serves(endpoint.id, "m")

    def serves(self, name: str, *models: str) -> None:
        registry = self.router.registry
        registry.models.listed(registry.get(name), frozenset(models))

    async def test_both_legs(self) -> None:
        self.serves("p2", "m", "lora")
        self.serves("d1", "m", "lora")
        for _ in range(6):
            forward = await self.route(LORA)
            self.assertEqual(forward.prefill.id, "p2")
            self.assertEqual([e.id for e in forward.decode], ["d1"], "Envoy tries no other")
            forward.release()
        served = set()
        for _ in range(6):
            forward = await self.route()
            served |= {forward.prefill.id, *(e.id for e in forward.decode)}
            forward.release()
        self.assertEqual(served, {"p0", "p1", "p2", "d0", "d1", "d2"})

    async def test_one_that_runs_anew_may_serve_another_one(self) -> None:
        """Also if it could not serve before, nor can yet: which models it has is not known."""
        for name in ("d1", "d2"):
            self.router.unregister_instance(name)
        self.down("d0")
        outcome = await self.route(LORA)
        self.assertEqual((outcome.status, outcome.reason), (404, "unknown_model"))
        endpoint = self.router.registry.get("d0")
        for started_at in (1.0, 2.0):
            self.router.registry.started(endpoint, started_at)
        self.assertEqual((await self.route(LORA)).status, 503)

    async def test_a_request_that_names_none_is_not_split_where_models_differ(self) -> None:
        """It would be one model's for P, and perhaps another one's for D."""
        unnamed = [
            {**BODY, "model": ""},
            {**BODY, "model": None},
            {k: v for k, v in BODY.items() if k != "model"},
        ]
        for name in ("p2", "d1"):
            self.serves(name, "other")
            for body in unnamed:
                forward = await self.route(body)
                self.assertIsNone(forward.prefill)
                forward.release()
            self.serves(name, "m")
            for body in unnamed:
                forward = await self.route(body)
                self.assertIsNotNone(forward.prefill)
                forward.release()

    async def test_a_p_that_fails_is_not_replaced_by_one_without_the_model(self) -> None:
        for name in ("p0", "p2", "d0", "d1", "d2"):
            self.serves(name, "m", "lora")
        self.fail_all(answer(500, ERROR))
        forward = await self.route(LORA)
        self.assertIsNone(forward.prefill)
        self.assertEqual(sorted(self.leg.tried), ["p0", "p2"])

    async def test_requests_that_are_not_split(self) -> None:
        self.serves("d2", "m", "lora")
        for _ in range(4):
            forward = await self.route({**LORA, "n": 2})
            self.assertEqual([e.id for e in forward.decode], ["d2"])
            forward.release()

    async def test_the_only_d_of_a_model_is_away(self) -> None:
        self.serves("d2", "lora")
        self.router.drain_instance("d2")
        error = self.assertRejected(await self.route(LORA), 503, "no_decode")
        self.assertEqual(error["message"], "No decode instance can serve this request now: d2 is draining.")
        self.assertEqual(self.leg.sent, [], "no P is troubled")

    async def test_the_only_d_of_a_model_is_ejected(self) -> None:
        """One that fails now and then is better than none."""
        self.serves("d2", "lora")
        for _ in range(3):
            self.router.registry.ends.failed(self.router.registry.get("d2"), "reset", 0.0)
        self.assertTrue(self.router.registry.get("d2").ejected)
        forward = await self.route(LORA)
        self.assertEqual([e.id for e in forward.decode], ["d2"])


class ServingCase(Case):
    def setUp(self) -> None:
        super().setUp()
        for endpoint in self.router.registry:
            self.serves(endpoint.id, "m")

    def serves(self, name: str, *models: str) -> None:
        registry = self.router.registry
        cards = {each: json.dumps({"id": each, "object": "model", "from": name}).encode() for each in models}
        registry.models.listed(
            registry.get(name), frozenset(models), frozenset(m for m in models if "lora" in m), cards
        )


class RewritesTest(ServingCase):
    CONFIG: Mapping[str, Any] = {
        "models": {"chat": {"targets": {"m": 1}}, "canary": {"targets": {"m": 1, "n": 1}}}
    }

    async def test_p_and_d_get_the_target_in_every_attempt(self) -> None:
        body = {**BODY, "model": "chat", "stop": ["\u00e9", "model"], "nested": {"model": "chat"}}
        forward = await self.route(body)
        self.assertEqual(json.loads(forward.body), {**body, "model": "m"}, "further attempts have this")
        self.assertEqual(decode_body(forward, body), {**body, "model": "m", "kv_transfer_params": PARAMS})
        self.assertEqual(self.leg.sent[0][3]["model"], "m")
        self.assertEqual(forward.pending.model, "m", "by which the hand-off is freed")
        self.assertEqual((forward.decision.model, forward.decision.asked_model), ("m", "chat"))
        self.assertEqual(self.count("pd_scheduler_rewrites_total", rule="chat", model="m"), 1.0)

    async def test_a_doubled_key_leaves_no_alias_behind(self) -> None:
        for raw in (
            b'{"model":"x","prompt":"p","model":"chat"}',
            b'\xef\xbb\xbf{"model": "chat", "prompt": "p"}',
        ):
            forward = await self.route(raw)
            self.assertEqual(json.loads(forward.body), {"prompt": "p", "model": "m"})
            forward.release()

    async def test_a_long_body(self) -> None:
        body = {"prompt": "long " * 20_000, "model": "chat", "max_tokens": 5}
        forward = await self.route(body)
        self.assertEqual(json.loads(forward.body), {**body, "model": "m"})
        self.assertEqual(decode_body(forward, body), {**body, "model": "m", "kv_transfer_params": PARAMS})

    async def test_others_stay_as_they_are(self) -> None:
        for body in (BODY, {**BODY, "model": None}, {"prompt": "x"}):
            forward = await self.route(body)
            self.assertIsNone(forward.body)
            self.assertIsNone(forward.decision.asked_model)
            forward.release()

    async def test_shares_and_sessions(self) -> None:
        for name in ("p2", "d2"):
            self.serves(name, "n")
        found = []
        for _ in range(20):
            forward = await self.route({**BODY, "model": "canary"})
            found.append(forward.decision.model)
            self.assertEqual(forward.prefill.id == "p2", forward.decode[0].id == "d2")
            forward.release()
        self.assertEqual(sorted(found), ["m"] * 10 + ["n"] * 10)
        for number in range(5):
            models = set()
            for _ in range(3):
                forward = await self.route({**BODY, "model": "canary"}, x_session_id=str(number))
                models.add(forward.decision.model)
                forward.release()
            self.assertEqual(len(models), 1)

    async def test_other_paths(self) -> None:
        forward = await self.route({"model": "chat", "input": "x"}, path="/v1/embeddings")
        self.assertEqual(json.loads(forward.body), {"input": "x", "model": "m"})
        self.assertEqual(forward.served, Served.PASSED)
        forward.release()
        for body in (b"", b"--multipart", b"[1]", b'{"input": "x"}', b'{"model": 7}', b'{"model": '):
            forward = await self.route(body, path="/v1/embeddings")
            self.assertIsNone(forward.body, "as it came")
            forward.release()

    async def test_a_reload_counts_at_once(self) -> None:
        config = SchedulerConfig(strategy="round_robin", models={"new": {"targets": {"m": 1}}})
        self.router.reconfigure(config, {"models"})
        forward = await self.route({**BODY, "model": "new"})
        self.assertEqual(forward.decision.model, "m")
        forward.release()
        self.assertRejected(await self.route({**BODY, "model": "chat"}), 404, "unknown_model")

    async def test_rules_of_another_source(self) -> None:
        self.router.rewrites.update("kubernetes", [Rewrite(None, [Target("m")], 1.0)])
        forward = await self.route({**BODY, "model": "made up"})
        self.assertEqual((forward.decision.model, forward.decision.asked_model), ("m", "made up"))
        self.assertEqual(self.count("pd_scheduler_rewrites_total", rule="*", model="m"), 1.0)


class UnknownTest(ServingCase):
    async def test_vllms_words(self) -> None:
        error = self.assertRejected(await self.route({**BODY, "model": "x"}), 404, "unknown_model")
        expected = {
            "message": "The model `x` does not exist.",
            "type": "NotFoundError",
            "param": "model",
            "code": 404,
        }
        self.assertEqual(error, expected)
        self.assertEqual(self.leg.sent, [], "no P is troubled")

    async def test_only_when_all_have_said(self) -> None:
        self.router.registry.models.listed(self.router.registry.get("d1"), None)
        forward = await self.route({**BODY, "model": "x"})
        self.assertEqual([e.id for e in forward.decode], ["d1"])

    async def test_one_that_may_serve_any(self) -> None:
        instance = self.router.registry.get("d1").instance
        self.router.registry.describe(
            "d1", PDInstance("d1", instance.role, instance.host, instance.port, models=frozenset("*"))
        )
        forward = await self.route({**BODY, "model": "x"})
        self.assertEqual([e.id for e in forward.decode], ["d1"])

    async def test_an_adapter_that_was_loaded_a_moment_ago(self) -> None:
        async def read() -> None:
            self.serves("d2", "m", "lora")

        self.router.catalog.read_again.read = read
        forward = await self.route(LORA)
        self.assertEqual([e.id for e in forward.decode], ["d2"])
        self.assertIsNone(forward.prefill, "no P has it")

    async def test_one_that_is_unloaded_while_it_is_prefilled(self) -> None:
        self.serves("d2", "m", "lora")
        self.serves("p2", "m", "lora")
        leg = self.leg

        class Slow:
            async def __call__(_, *call: Any) -> Any:
                self.serves("d2", "m")
                return await leg(*call)

        self.router.prefill_leg = Slow()
        outcome = await self.route(LORA)
        self.assertRejected(outcome, 404, "unknown_model")
        self.assertEqual(
            self.count("pd_scheduler_handoffs_unused_total", prefill="p2", outcome="stranded"), 1.0
        )

    async def test_other_paths(self) -> None:
        self.serves("d2", "m", "n")
        outcome = await self.route({"model": "x", "input": "y"}, path="/v1/embeddings")
        self.assertRejected(outcome, 404, "unknown_model")
        forward = await self.route({"model": "n", "input": "y"}, path="/v1/embeddings")
        self.assertEqual([e.id for e in forward.decode], ["d2"])


class CatalogTest(ServingCase):
    CONFIG: Mapping[str, Any] = {"models": {"gone": {"targets": {"x": 1}}}}

    async def asked(self, path: str = "/v1/models", method: str = "GET") -> Any:
        return await self.route(b"", path=path, method=method)

    async def listed(self) -> list[Any]:
        found = await self.asked()
        self.assertIsInstance(found, OwnAnswer)
        self.assertEqual((found.status, found.headers["content-type"]), (200, "application/json"))
        data = json.loads(found.body)
        self.assertEqual(data["object"], "list")
        return list(data["data"])

    async def test_a_fleet_of_one_model_answers_itself(self) -> None:
        forward = await self.asked()
        self.assertEqual(forward.served, Served.PASSED)

    async def test_nothing_is_known(self) -> None:
        for endpoint in self.router.registry:
            self.router.registry.models.listed(endpoint, None)
        self.assertEqual((await self.asked()).served, Served.PASSED)

    async def test_the_union(self) -> None:
        self.serves("d1", "n", "n-lora")
        self.serves("p0", "only-p")
        found = await self.listed()
        self.assertEqual([card["id"] for card in found], ["m", "n", "n-lora"])
        self.assertEqual(found[1], {"id": "n", "object": "model", "from": "d1"}, "as it has said")
        self.serves("d1", "n")
        self.assertEqual([card["id"] for card in await self.listed()], ["m", "n"])
        self.router.registry.remove("d1")
        self.assertEqual((await self.asked()).served, Served.PASSED, "all say the same again")

    async def test_aliases(self) -> None:
        rules = [Rewrite("a", [Target("x", 9), Target("m", 1)]), Rewrite("m", [Target("m")])]
        self.router.rewrites.update("test", rules)
        found = await self.listed()
        self.assertEqual([card["id"] for card in found], ["m", "a"])
        self.assertEqual(found[1], {**found[0], "id": "a"})

    async def test_configured_ones_that_are_not_listed(self) -> None:
        instance = self.router.registry.get("d0").instance
        configured = PDInstance("d0", instance.role, instance.host, instance.port, models=frozenset({"c"}))
        self.router.registry.describe("d0", configured)
        (card, _) = await self.listed()
        self.assertEqual((card["id"], card["object"], card["root"]), ("c", "model", "c"))

    async def test_it_is_made_once(self) -> None:
        self.serves("d1", "n")
        first = await self.asked()
        self.assertIs((await self.asked()).body, first.body)

    async def test_it_is_no_refusal_and_no_decision(self) -> None:
        self.serves("d1", "n")
        await self.asked()
        await self.asked("/health?model=x")
        self.assertEqual(self.router.telemetry.totals.requests, 0)
        self.assertEqual(self.router.decisions.newest, 0)

    async def test_cards_of_what_nobody_lists_are_dropped(self) -> None:
        for number in range(100):
            self.serves("d1", "m", f"lora-{number}")
        self.assertLess(len(self.router.registry.models.cards), 4)

    async def test_health(self) -> None:
        self.serves("d1", "m", "n")
        self.serves("d2", "m", "o")
        self.serves("p2", "m", "o")
        rules = [Rewrite("alias", [Target("n"), Target("m")]), Rewrite("of-n", [Target("n")])]
        self.router.rewrites.update("test", rules)

        async def health(name: str) -> int:
            found = await self.asked(f"/health?x=1&model={name}")
            self.assertEqual(set(json.loads(found.body)), {"status"})
            status: int = found.status
            return status

        expected = {"m": 200, "n": 200, "o": 200, "x": 404, "alias": 200, "of-n": 200, "gone": 404}
        self.assertEqual({name: await health(name) for name in expected}, expected)
        self.down("d1", "p2")
        expected |= {"n": 503, "o": 503, "of-n": 503}
        self.assertEqual({name: await health(name) for name in expected}, expected)
        many = "x&" * 1000
        self.assertEqual([await health(f"m{end}") for end in ("&" + many, "&model=x", "&=")], [200] * 3)
        self.assertEqual((await self.asked(f"/health?{many}model=x")).status, 404)

    async def test_health_of_the_fleet_is_told_to_gateways(self) -> None:
        self.serves("d1", "m")
        paths = ("/health", "/health?model=", "/health?other=1", "/ping", "/ping?model=x")
        for down, status in ((), 200), (("p0", "p1", "p2"), 503):
            self.down(*down)
            for path in paths:
                found = await self.asked(path)
                said = "served" if status == 200 else "away"
                self.assertEqual((found.status, json.loads(found.body)), (status, {"status": said}), path)


class RevisionsTest(Case):
    CONFIG: Mapping[str, Any] = {"strategy": "least_load"}

    def setUp(self) -> None:
        super().setUp()
        self.revise(p0="a", p1="b", p2="c", d0="a", d1="b", d2="b")

    def revise(self, **revisions: str | None) -> None:
        for name, revision in revisions.items():
            old = self.router.registry.get(name).instance
            new = PDInstance(name, old.role, old.host, old.port, revision=revision)
            self.router.registry.describe(name, new)

    async def test_the_first_d_is_one_that_fits_and_further_ones_any(self) -> None:
        pairs, running = set(), []
        for _ in range(12):
            forward = await self.route()
            first = forward.decode[0]
            self.assertEqual(first.instance.revision, forward.prefill.instance.revision)
            self.assertEqual({e.id for e in forward.decode}, {"d0", "d1", "d2"})
            same = {e for e in forward.decode if e.instance.revision == first.instance.revision}
            self.assertEqual(set(forward.only), same)
            pairs.add((forward.prefill.id, first.id))
            running.append(forward)
        self.assertEqual(pairs, {("p0", "d0"), ("p1", "d1"), ("p1", "d2")})

    async def test_a_fleet_of_one_says_nothing_of_it(self) -> None:
        self.revise(p0="a", p1="a", p2="a", d0="a", d1="a", d2="a")
        forward = await self.route()
        self.assertIsNone(forward.only)

    async def test_its_d_go_while_p_works(self) -> None:
        leg = self.leg

        class Slow:
            async def __call__(_, endpoint: Any, *call: Any) -> Any:
                for name in {"p0": ("d0",), "p1": ("d1", "d2")}[endpoint.id]:
                    self.router.drain_instance(name)
                return await leg(endpoint, *call)

        self.router.prefill_leg = Slow()
        forward = await self.route()
        self.assertLocal(forward)
        unused = [
            self.count("pd_scheduler_handoffs_unused_total", prefill=p, outcome="stranded")
            for p in ("p0", "p1")
        ]
        self.assertEqual(sum(unused), 1.0)

    async def test_no_d_fits(self) -> None:
        self.revise(d0="x", d1="y", d2="z")
        self.assertLocal(await self.route())
        self.assertEqual(self.leg.sent, [])

    async def test_a_failed_prefill_goes_to_one_that_fits_too(self) -> None:
        self.leg.answers["p0"] = answer(500, ERROR)
        for _ in range(4):
            forward = await self.route()
            self.assertEqual(forward.prefill.id, "p1")
            self.assertEqual(forward.decode[0].instance.revision, "b")
            forward.release()
