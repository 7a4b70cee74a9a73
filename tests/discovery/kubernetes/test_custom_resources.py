"""InferenceObjectives and InferenceModelRewrites: what is told of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from tests.support.kubernetes import OLD_OBJECTIVES, ApiServer, Refusal
from tests.support.kubernetes_answers import line
from tests.support.kubernetes_objects import Json
from tests.support.waiting import until
from vllm_pd_scheduler.discovery.kubernetes import watch
from vllm_pd_scheduler.discovery.kubernetes.api import Api
from vllm_pd_scheduler.discovery.kubernetes.objectives import Objectives, Priorities
from vllm_pd_scheduler.discovery.kubernetes.objects import InferenceModelRewrite
from vllm_pd_scheduler.discovery.kubernetes.rewrites import ModelRewrites, Rules, rules_of
from vllm_pd_scheduler.request.rewrites import Rewrite as Rule
from vllm_pd_scheduler.request.rewrites import Target

OLD = OLD_OBJECTIVES[0]


def objective(name: str, priority: Any = None, pool: str = "chat", **spec: Any) -> Json:
    spec = {"poolRef": {"name": pool}, **spec}
    return {"metadata": {"name": name}, "spec": spec if priority is None else {**spec, "priority": priority}}


def rewrite(name: str, *rules: Json, pool: str = "chat", created: str = "2026-01-01T00:00:00Z") -> Json:
    spec = {"poolRef": {"name": pool}, "rules": list(rules)}
    return {"metadata": {"name": name, "creationTimestamp": created}, "spec": spec}


def rule(*models: str, **targets: int | None) -> Json:
    """Return a rule; targets with ``_`` for ``-``."""
    return {
        "matches": [{"model": {"type": "Exact", "value": model}} for model in models],
        "targets": [
            {"modelRewrite": key.replace("_", "-"), **({} if weight is None else {"weight": weight})}
            for key, weight in targets.items()
        ],
    }


@asynccontextmanager
async def following(follower: Objectives | ModelRewrites) -> AsyncIterator[None]:
    task = asyncio.ensure_future(follower.follow())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class TestObjectives:
    async def test_they_come_and_go(self, api: Api, server: ApiServer) -> None:
        server.put("inferenceobjectives", objective("urgent", 10))
        server.put("inferenceobjectives", objective("elsewhere", 10, pool="another"))
        told: list[Priorities] = []
        async with following(Objectives(api, "llm", "chat", told.append)):
            await until(lambda: told[-1:] == [{"urgent": 10}])
            server.put("inferenceobjectives", objective("batch", -5))
            server.put("inferenceobjectives", objective("usual"))
            await until(lambda: told[-1:] == [{"urgent": 10, "batch": -5, "usual": 0}])
            server.put("inferenceobjectives", objective("urgent", 20))
            server.remove("inferenceobjectives", "batch")
            await until(lambda: told[-1:] == [{"urgent": 20, "usual": 0}])

    async def test_the_old_group_counts_where_the_new_one_has_none(self, api: Api, server: ApiServer) -> None:
        server.kinds.add(OLD_OBJECTIVES)
        server.put("inferenceobjectives", objective("a", 1), version=OLD)
        server.put("inferenceobjectives", objective("b", 2), version=OLD)
        server.put("inferenceobjectives", objective("b", 3))
        told: list[Priorities] = []
        async with following(Objectives(api, "llm", "chat", told.append)):
            await until(lambda: told[-1:] == [{"a": 1, "b": 3}])

    async def test_pools(self, api: Api, server: ApiServer) -> None:
        several = {"poolRef": None, "poolRefs": [{"name": "x"}, {"name": "chat"}]}
        server.put("inferenceobjectives", objective("several", 1, **several))
        server.put("inferenceobjectives", objective("elsewhere", 2, pool="x"))
        told: list[Priorities] = []
        async with following(Objectives(api, "llm", "chat", told.append)):
            await until(lambda: told[-1:] == [{"several": 1}])
        async with following(Objectives(api, "llm", None, told.append)):
            await until(lambda: told[-1:] == [{"several": 1, "elsewhere": 2}])

    async def test_a_cluster_without_them(
        self, api: Api, server: ApiServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(watch, "ABSENT_S", 0.05)
        objectives = server.kinds.copy()
        server.kinds.clear()
        told: list[Priorities] = []
        async with following(Objectives(api, "llm", "chat", told.append)):
            await until(lambda: server.asked("list") > 4)
            assert told == []
            assert caplog.text == ""
            server.kinds = objectives  # they are installed
            server.put("inferenceobjectives", objective("a", 1))
            await until(lambda: told == [{"a": 1}])

    async def test_what_makes_no_sense_and_refusals(
        self, api: Api, server: ApiServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        server.put("inferenceobjectives", objective("good", 1))
        server.put("inferenceobjectives", objective("bad", "high"))
        told: list[Priorities] = []
        async with following(Objectives(api, "llm", "chat", told.append)):
            await until(lambda: told == [{"good": 1}])
            server.refuse_all = Refusal(403, b"")
            server.expire()
            await until(lambda: "inferenceobjectives in namespace llm: 403" in caplog.text)
            assert "the priorities that were known stay" in caplog.text
            assert caplog.text.count("'bad' makes no sense") == 1
            assert told == [{"good": 1}]


def ruled(*found: Json) -> Rules:
    return rules_of(msgspec.json.decode(line(each), type=InferenceModelRewrite) for each in found)


class TestRules:
    def test_targets(self) -> None:
        assert ruled(rewrite("r", rule("chat", chat_v1=95, chat_v2=5))) == (
            Rule("chat", (Target("chat-v1", 95), Target("chat-v2", 5))),
        )
        unweighted = ruled(rewrite("r", rule("chat", a=None, b=None)))
        assert unweighted == (Rule("chat", (Target("a", 1), Target("b", 1))),)
        assert ruled(rewrite("r", rule("chat", a=1, b=0, c=None))) == (Rule("chat", (Target("a", 1),)),)
        assert ruled(rewrite("r", rule("chat"))) == ()
        assert ruled(rewrite("r", {"matches": [{"model": {"value": "chat"}}], "targets": None})) == ()

    def test_matches(self) -> None:
        several = ruled(rewrite("r", rule("a", "b", x=1)))
        assert [each.model for each in several] == ["a", "b"]
        assert ruled(rewrite("r", rule(x=1))) == (Rule(None, (Target("x", 1),)),)
        assert ruled(rewrite("r", {"matches": [{}], "targets": [{"modelRewrite": "x"}]}))[0].model is None
        other = {"matches": [{"model": {"type": "Prefix", "value": "a"}}], "targets": [{"modelRewrite": "x"}]}
        assert ruled(rewrite("r", other)) == ()

    def test_the_oldest_counts_and_the_first_in_it(self) -> None:
        new = rewrite("a", rule("chat", new=1), rule("only", new=1), created="2026-02-01T00:00:00Z")
        old = rewrite("b", rule("chat", first=1), rule("chat", second=1), rule(any=1))
        twin = rewrite("c", rule("chat", twin=1))
        for order in ((new, old, twin), (twin, old, new)):
            assert {each.model: each.targets[0].model for each in ruled(*order)} == {
                "chat": "first",
                "only": "new",
                None: "any",
            }


async def test_rewrites_come_and_go(api: Api, server: ApiServer, caplog: pytest.LogCaptureFixture) -> None:
    server.put("inferencemodelrewrites", rewrite("r", rule("chat", v1=1)))
    server.put("inferencemodelrewrites", rewrite("x", rule("other", v1=1), pool="another"))
    server.put("inferencemodelrewrites", {"metadata": {"name": "bad"}, "spec": {"rules": [7]}})
    told: list[Rules] = []
    async with following(ModelRewrites(api, "llm", "chat", told.append)):
        await until(lambda: told[-1:] == [(Rule("chat", (Target("v1", 1),)),)])
        server.put("inferencemodelrewrites", rewrite("r", rule("chat", v1=95, v2=5)))
        await until(lambda: told[-1:] == [(Rule("chat", (Target("v1", 95), Target("v2", 5))),)])
        server.put("inferencemodelrewrites", {"metadata": {"name": "r"}, "spec": {"rules": "none"}})
        server.put("inferencemodelrewrites", rewrite("s", rule("more", v1=1)))
        await until(lambda: len(told[-1]) == 2)  # what made sense of r stays
        server.remove("inferencemodelrewrites", "r")
        await until(lambda: [each.model for each in told[-1]] == ["more"])
    assert caplog.text.count("'bad' makes no sense") == 1
