"""A P that hangs is told from one that is slow, and from one that answers anything at all."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from tests.support.waiting import until
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.health import monitor as health
from vllm_pd_scheduler.health.probe import Probe
from vllm_pd_scheduler.health.silence import Silence
from vllm_pd_scheduler.models import InstanceRole, InstanceState, PDInstance

from .instances import Fixture

HEALTHY, UNHEALTHY = InstanceState.HEALTHY, InstanceState.UNHEALTHY
P, D = InstanceRole.PREFILL, InstanceRole.DECODE


class Questions:
    """A probe whose questions the test answers."""

    def __init__(self) -> None:
        self.open: list[asyncio.Future[bool]] = []
        self.asked = 0

    async def gets_no_answer(self, endpoint: Endpoint, seconds: float) -> bool:
        self.asked += 1
        self.open.append(asyncio.get_running_loop().create_future())
        return await self.open[-1]


class Stage:
    def __init__(self) -> None:
        self.questions = Questions()
        self.hung: list[Endpoint] = []
        self.silence = Silence(cast(Probe, self.questions), 10.0, self.hung.append)
        self.p0 = Endpoint(PDInstance("p0", P, "10.0.0.1", 8000))

    async def ended(self, silent: bool) -> None:
        await until(lambda: self.questions.open)
        self.questions.open.pop().set_result(silent)
        await asyncio.sleep(0)
        await asyncio.sleep(0)


@pytest.fixture
def stage() -> Stage:
    return Stage()


class TestSilence:
    async def test_one_that_never_answers_hangs_and_is_told_once(self, stage: Stage) -> None:
        for _ in range(3):
            stage.silence.unanswered(stage.p0)
        await stage.ended(silent=True)
        stage.silence.unanswered(stage.p0)
        await asyncio.sleep(0)
        assert (stage.hung, stage.questions.asked) == ([stage.p0], 1)

    async def test_one_that_answers_late_is_slow_and_asked_again(self, stage: Stage) -> None:
        for _ in range(3):
            stage.silence.unanswered(stage.p0)
            await stage.ended(silent=False)
        assert (stage.hung, stage.questions.asked) == ([], 3)

    async def test_the_answer_to_a_probe_counts_too(self, stage: Stage) -> None:
        stage.silence.unanswered(stage.p0)
        await until(lambda: stage.questions.open)
        stage.silence.answered(stage.p0)
        await asyncio.sleep(0)
        assert stage.questions.open[0].cancelled()
        assert stage.hung == []

    async def test_one_that_hangs_again_is_told_again(self, stage: Stage) -> None:
        for _ in range(2):
            stage.silence.unanswered(stage.p0)
            await stage.ended(silent=True)
            stage.silence.answered(stage.p0)
        assert stage.hung == [stage.p0, stage.p0]

    async def test_what_waits_at_one_that_is_removed_is_given_up_all_the_same(self, stage: Stage) -> None:
        stage.silence.unanswered(stage.p0)
        stage.silence.removed(stage.p0)
        await stage.ended(silent=True)
        assert stage.hung == [stage.p0]
        assert not any((stage.silence._found, stage.silence._asking, stage.silence._of_removed))

    async def test_the_end_ends_the_questions(self, stage: Stage) -> None:
        other = Endpoint(PDInstance("p1", P, "10.0.0.2", 8000))
        for endpoint in (stage.p0, other):
            stage.silence.unanswered(endpoint)
        await until(lambda: len(stage.questions.open) == 2)
        stage.silence.removed(other)
        await stage.silence.stop()
        assert all(question.cancelled() for question in stage.questions.open)
        assert stage.hung == []


class Watched:
    """One instance, its server, and who was found to hang."""

    def __init__(self, fleet: Fixture) -> None:
        self.fleet = fleet
        self.hung: list[Endpoint] = []

    async def start(self, monkeypatch: pytest.MonkeyPatch, timeouts: float, role: InstanceRole = P) -> None:
        monkeypatch.setattr(health, "HUNG_TIMEOUTS", timeouts)
        monkeypatch.setattr(health, "RECOVERY_INTERVAL_S", 0.01)
        self.server = await self.fleet.serve(None)
        self.endpoint = self.fleet.add("p0", "127.0.0.1", self.server.port, role=role)
        await self.fleet.monitor(timeout=0.2, hung=self.hung.append).start()
        await until(lambda: self.endpoint.state is HEALTHY)


@pytest.fixture
def watched(fleet: Fixture) -> Watched:
    return Watched(fleet)


class TestMonitor:
    async def test_one_that_answers_nothing(self, watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
        await watched.start(monkeypatch, timeouts=2)
        watched.server.mute()
        await until(lambda: watched.hung == [watched.endpoint])
        assert watched.endpoint.state is UNHEALTHY

    async def test_one_that_is_only_slow(self, watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
        """It answers no probe in time, and all of them in the end."""
        await watched.start(monkeypatch, timeouts=100_000)
        watched.server.mute()
        await until(lambda: watched.endpoint.state is UNHEALTHY)
        probes = watched.server.probes
        await until(lambda: watched.server.probes > probes + 2)
        watched.server.go.set()
        await until(lambda: watched.endpoint.state is HEALTHY)
        assert watched.hung == []

    @pytest.mark.parametrize("what", ["metrics", "an error"])
    async def test_one_that_answers_anything(
        self, watched: Watched, monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        await watched.start(monkeypatch, timeouts=0)
        if what == "metrics":
            watched.server.go.clear()
        else:
            watched.server.status = watched.server.page_status = 503
        await until(lambda: watched.endpoint.state is UNHEALTHY)
        scrapes = watched.server.scrapes
        await until(lambda: watched.server.scrapes > scrapes + 3)
        assert watched.hung == []

    async def test_one_that_is_gone(self, watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its connections end by themselves."""
        await watched.start(monkeypatch, timeouts=0)
        failed = watched.fleet.failed_scrapes("p0")
        await watched.fleet.runners[0].cleanup()
        await until(lambda: watched.fleet.failed_scrapes("p0") > failed + 3)
        assert (watched.endpoint.state, watched.hung) == (UNHEALTHY, [])

    async def test_a_d(self, watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
        """What waits there is Envoy's."""
        await watched.start(monkeypatch, timeouts=0, role=D)
        watched.server.mute()
        await until(lambda: watched.endpoint.state is UNHEALTHY)
        probes = watched.server.probes
        await until(lambda: watched.server.probes > probes + 2)
        assert watched.hung == []
