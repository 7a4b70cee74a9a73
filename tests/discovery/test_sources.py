"""Sources as they come and go with the configuration, and what is known before they have spoken."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from tests.support.config import fleet as configured
from tests.support.waiting import until
from vllm_pd_scheduler.config import parse_config
from vllm_pd_scheduler.discovery import sources as module
from vllm_pd_scheduler.discovery.source import Report
from vllm_pd_scheduler.discovery.sources import Sources
from vllm_pd_scheduler.models import InstanceRole, PDInstance
from vllm_pd_scheduler.router import PDRouter

ENTRY = {"type": "kubernetes", "selector": "app=vllm", "ports": [8000]}


class Told:
    """A source that tells what a test says."""

    name = "told"

    def __init__(self) -> None:
        self.report: Report | None = None
        self.followed = 0
        self.bug = False

    async def follow(self, report: Report) -> None:
        self.followed += 1
        self.report = report
        if self.bug:
            raise RuntimeError("a bug")
        await asyncio.get_running_loop().create_future()

    def d(self, *names: str) -> None:
        assert self.report is not None
        self.report.found([PDInstance(n, InstanceRole.DECODE, f"10.0.3.{i}", 1) for i, n in enumerate(names)])


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Told:
    told = Told()
    monkeypatch.setattr(module, "_made", lambda *_: told)
    return told


@pytest.fixture
def router() -> PDRouter:
    return PDRouter(parse_config({"discovery": [ENTRY]}))


@pytest_asyncio.fixture
async def sources(source: Told, router: PDRouter) -> AsyncIterator[Sources]:
    made = Sources(router.config, router.membership, time.monotonic)
    made.read()
    await made.follow()
    yield made
    await made.stop()


def ids(router: PDRouter) -> set[str]:
    return {endpoint.id for endpoint in router.registry}


async def followed(source: Told) -> Callable[..., None]:
    await until(lambda: source.report is not None)
    return source.d


async def test_a_start_waits_for_the_first_word(source: Told, router: PDRouter, sources: Sources) -> None:
    assert router.membership.silent == {"told"}
    assert not router.membership.knows(InstanceRole.DECODE)
    assert router.membership.no_news == "no news from 1 of 2 sources of instances"
    tell = await followed(source)
    waiting = asyncio.ensure_future(sources.first_words())
    await asyncio.sleep(0)
    assert not waiting.done()
    tell("d1", "d2")
    await waiting
    assert ids(router) == {"d1", "d2"}
    assert router.membership.knows(InstanceRole.PREFILL)  # that there is none
    assert router.membership.no_news is None


async def test_but_not_for_ever(
    sources: Sources, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "FIRST_WORD_S", 0.01)
    with caplog.at_level(logging.WARNING):
        await sources.first_words()
    assert "no word yet from told" in caplog.text


def test_a_role_that_others_have_instances_of_is_known(source: Told) -> None:
    router = PDRouter(parse_config(configured(discovery=[ENTRY])))
    Sources(router.config, router.membership, time.monotonic).read()
    assert router.membership.silent
    assert router.membership.knows(InstanceRole.DECODE)


async def test_listeners_hear_that_there_is_nothing(source: Told, router: PDRouter, sources: Sources) -> None:
    heard: list[bool] = []
    router.registry.changes.subscribe(lambda: heard.append(router.membership.knows(InstanceRole.DECODE)))
    (await followed(source))()
    assert heard[-1:] == [True]


async def test_one_that_is_named_no_more_lets_its_instances_go(
    source: Told, router: PDRouter, sources: Sources
) -> None:
    (await followed(source))("d1")
    router.config.take(parse_config(configured()), ["discovery"])
    await sources.follow()
    assert ids(router) == set()
    assert not router.membership.silent


async def test_one_that_stays_keeps_them_when_it_begins_again(
    source: Told, router: PDRouter, sources: Sources
) -> None:
    (await followed(source))("d1")
    await sources.follow()
    await until(lambda: source.followed == 2)
    assert ids(router) == {"d1"}
    assert not router.membership.silent


async def test_what_one_that_was_stopped_still_says_is_not_heard(
    source: Told, router: PDRouter, sources: Sources
) -> None:
    """A thread of its may have something under way."""
    tell = await followed(source)
    tell("d1")
    router.config.take(parse_config(configured()), ["discovery"])
    await sources.follow()
    tell("d1", "d2")
    assert source.report is not None
    source.report.unchanged()
    source.report.lost("it is no more")
    assert ids(router) == set()
    assert router.membership.ages(time.monotonic()) == {}
    assert router.membership.no_news is None


async def test_what_another_source_names_from_now_on_does_not_drain(
    router: PDRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not what operators have removed comes back."""
    old, new = Told(), Told()
    new.name = "new"
    monkeypatch.setattr(module, "_made", lambda *_: old)
    sources = Sources(router.config, router.membership, time.monotonic)
    await sources.follow()
    await until(lambda: old.report is not None)
    old.d("d1", "d2", "d3")
    router.unregister_instance("d2")
    changes: list[set[str]] = []
    router.registry.changes.subscribe(
        lambda: changes.append({e.id for e in router.registry if not e.draining})
    )
    monkeypatch.setattr(module, "_made", lambda *_: new)
    following = asyncio.ensure_future(sources.follow())
    await until(lambda: new.report is not None)
    new.d("d1", "d2")
    await following
    await until(lambda: ids(router) == {"d1"})
    assert all("d1" in each for each in changes)
    assert [each.instance_id for each in router.membership.removed()] == ["d2"]
    await sources.stop()


async def test_one_that_takes_the_place_of_another_is_not_waited_for_for_ever(
    router: PDRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_WORD_S", 0.01)
    old, new = Told(), Told()
    new.name = "new"
    monkeypatch.setattr(module, "_made", lambda *_: old)
    sources = Sources(router.config, router.membership, time.monotonic)
    await sources.follow()
    await until(lambda: old.report is not None)
    old.d("d1")
    monkeypatch.setattr(module, "_made", lambda *_: new)
    await sources.follow()
    await until(lambda: not ids(router))
    await sources.stop()


async def test_a_bug_in_one_is_reported_and_it_begins_again(
    source: Told, router: PDRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AGAIN_S", 0.01)
    source.bug = True
    sources = Sources(router.config, router.membership, time.monotonic)
    await sources.follow()
    await until(lambda: source.followed > 1)
    source.bug = False
    before = source.followed
    await until(lambda: source.followed > before)
    source.d("d1")
    assert ids(router) == {"d1"}
    await sources.stop()
    assert any("its follower has failed" in event.text for event in router.events.after(0))
