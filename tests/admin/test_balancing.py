"""Instances get the other role by themselves: within limits, one at a time, and never against an operator."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio

from tests.admin.test_turning import Fleet
from tests.advice.test_turns import KEEP, move
from tests.support.waiting import until
from vllm_pd_scheduler.admin import turning
from vllm_pd_scheduler.admin.balancing import Balancing
from vllm_pd_scheduler.admin.changes import AdminChanges
from vllm_pd_scheduler.admin.refusals import NotShared
from vllm_pd_scheduler.admin.turning import Turning
from vllm_pd_scheduler.advice.verdict import Advice
from vllm_pd_scheduler.config.turning import TurningConfig
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.handoff.role_switch import NotSwitched
from vllm_pd_scheduler.models import InstanceRole

P, D = InstanceRole.PREFILL, InstanceRole.DECODE


class Balanced(Fleet):
    """Four P, three of which can be turned, and two D that can."""

    def __init__(self, of_workers: bool = False, **limits: Any) -> None:
        super().__init__(turning={"looks": 1, **limits})
        self.advice = move(2)
        self.asked = 0
        self.told: list[tuple[str, InstanceRole]] = []
        self.refuses: NotSwitched | None = None
        self.changes = AdminChanges(self.router)
        adviser: Any = SimpleNamespace(advise=self._advise)
        self.turning = Turning(self.router, self.changes, lambda: self.ready, self._switch)
        self.balancing = Balancing(
            self.router, self.changes, self.turning, adviser, lambda: self.ready, of_workers
        )

    async def _advise(self, seconds: float) -> Advice:
        self.asked += 1
        return self.advice

    async def _switch(self, endpoint: Endpoint, role: InstanceRole) -> None:
        self.told.append((endpoint.id, role))
        if self.refuses is not None:
            raise self.refuses

    async def look(self) -> None:
        limits = self.router.config.turning
        assert limits is not None
        await self.balancing.look(limits)

    def roles(self) -> dict[str, InstanceRole]:
        found = {each.instance_id: each.role for each in self.router.get_instances()}
        return {name: role for name, role in found.items() if name != "fixed"}

    def turned(self) -> list[str]:
        return [name for name, role in self.roles().items() if (name[0] == "p") is not (role is P)]


@pytest_asyncio.fixture
async def fleet() -> AsyncIterator[Balanced]:
    found = Balanced()
    yield found
    await found.turning.close()


def configured(**limits: Any) -> TurningConfig:
    return TurningConfig(looks=1, **limits)


async def test_the_one_with_the_least_to_do_is_turned(fleet: Balanced) -> None:
    for name in ("p0", "fixed"):
        fleet.router.registry.work.reserve(fleet.router.registry.get(name))
    await fleet.look()
    assert fleet.turned() == ["p1"]
    assert fleet.told == [("p1", D)], "it was told before it counted as D"
    text = "p1 is to have the other role: move (the same 1 times)"
    assert text in fleet.said()
    assert ("p1 was turned: it is a decode instance now", "advice") in [
        (each.text, each.by) for each in fleet.router.events.after(0)
    ]
    value = fleet.router.telemetry.prometheus.get_sample_value
    assert value("pd_scheduler_turns_total", {"role": "decode", "by": "advice", "outcome": "turned"}) == 1


async def test_none_is_turned_back_soon_after(fleet: Balanced) -> None:
    await fleet.look()
    fleet.healthy("p0")
    fleet.advice = move(4)
    await fleet.look()
    await fleet.look()
    assert fleet.turned() == ["p0"]


async def test_another_of_the_role_follows_at_the_next_look(fleet: Balanced) -> None:
    await fleet.look()
    fleet.healthy("p0")
    await fleet.look()
    assert fleet.turned() == ["p0", "p1"]


async def test_nothing_is_turned_without_such_advice(fleet: Balanced) -> None:
    fleet.advice = KEEP
    await fleet.look()
    assert not fleet.turned()


@pytest.mark.parametrize(("limits", "advice"), [({"min_prefill": 4}, move(2)), ({"min_decode": 2}, move(4))])
async def test_so_many_stay(limits: dict[str, int], advice: Advice) -> None:
    fleet = Balanced(**limits)
    fleet.advice = advice
    await fleet.look()
    assert not fleet.turned()
    assert [each for each in fleet.said() if "instances may be left" in each]


async def test_an_operator_goes_first(fleet: Balanced) -> None:
    await fleet.changes.drain("d0")
    await fleet.changes.undrain("d0")
    await fleet.look()
    assert not fleet.turned()


async def test_nothing_is_turned_while_an_instance_drains(fleet: Balanced) -> None:
    fleet.router.drain_instance("d0", "discovery")
    await fleet.look()
    assert not fleet.asked


async def test_an_operator_ends_a_turn(fleet: Balanced) -> None:
    for name in ("p0", "p1", "p2"):
        fleet.router.registry.work.reserve(fleet.router.registry.get(name))

    async def undrain(seconds: float | None) -> None:
        (name,) = (each.id for each in fleet.router.registry if each.draining)
        await fleet.changes.undrain(name)
        await waits(seconds)

    waits, fleet.turning.wait = fleet.turning.wait, undrain  # type: ignore[method-assign]
    await fleet.look()
    assert not fleet.turned()
    assert not [each.id for each in fleet.router.registry if each.draining]
    assert "p0 was not turned: it was undrained" in fleet.said()
    await fleet.look()
    assert fleet.asked == 2
    assert not [each.id for each in fleet.router.registry if each.draining]


@pytest.mark.parametrize(
    ("of_workers", "own", "others", "turns"),
    [
        (True, "bw0.1", ["aw1.2", "bw1.3"], False),
        (True, "bw1.1", ["cw1.2", "bw0.3"], True),
        (True, "w1.1", ["w0.2"], True),
        (False, "b.1", ["a.2"], False),
        (False, "a.1", ["b.2"], True),
        (False, "w2.1", ["w1.2"], False),  # names like those of workers are names all the same
        (False, "neww1.1", ["neww2.2"], True),
        (False, "2ee774b2", ["1ee774b2"], False),
    ],
)
async def test_one_scheduler_does_it(of_workers: bool, own: str, others: list[str], turns: bool) -> None:
    fleet = Balanced(of_workers=of_workers)
    fleet.router.sync = SimpleNamespace(replica=SimpleNamespace(name=own, others=others))  # type: ignore[assignment]
    await fleet.look()
    assert bool(fleet.asked) is turns
    assert bool(fleet.turned()) is turns


async def test_an_engine_that_refuses_serves_as_before(fleet: Balanced) -> None:
    fleet.refuses = NotSwitched("/pd_role_switch was answered 400 busy", usable=True)
    await fleet.look()
    assert not fleet.turned()
    assert not [each.id for each in fleet.router.registry if each.draining]
    assert "p0 was not turned: /pd_role_switch was answered 400 busy" in fleet.said()
    value = fleet.router.telemetry.prometheus.get_sample_value
    assert value("pd_scheduler_turns_total", {"role": "decode", "by": "advice", "outcome": "failed"}) == 1
    await fleet.look()
    assert len(fleet.told) == 1, "it is not asked again before the pause is over"


async def test_an_engine_of_which_nobody_knows_its_role_gets_nothing(fleet: Balanced) -> None:
    fleet.refuses = NotSwitched("/pd_role_switch: no answer within 300 s", usable=False)
    await fleet.look()
    assert [each.id for each in fleet.router.registry if each.draining] == ["p0"]
    assert not fleet.turned()


async def test_a_drain_that_the_scheduler_cannot_see_end_is_ended(fleet: Balanced) -> None:
    for name in ("p0", "p1", "p2"):
        fleet.router.registry.work.reserve(fleet.router.registry.get(name))
    fleet.ready = False
    await fleet.look()
    assert not [each.id for each in fleet.router.registry if each.draining]


async def test_limits_that_change_count_at_once(fleet: Balanced) -> None:
    before = fleet.router.config.turning
    assert before is not None
    config = fleet.router.config
    config.take(config.model_copy(update={"turning": configured(pause=1.0)}), ["turning"])
    await fleet.balancing.look(before)
    assert not fleet.turned()
    assert replace(fleet.advice, gain=0.0).from_role is P


class Meanwhile(Balanced):
    """While the engine takes its other role, something happens."""

    def __init__(
        self, happens: Callable[[Meanwhile], Awaitable[object]], cannot_go_back: bool = False
    ) -> None:
        super().__init__()
        self.happens = happens
        self.cannot_go_back = cannot_go_back

    async def _switch(self, endpoint: Endpoint, role: InstanceRole) -> None:
        await super()._switch(endpoint, role)
        if len(self.told) == 1:
            await self.happens(self)
        elif self.cannot_go_back:
            raise NotSwitched("/pd_role_switch was answered 404", usable=True)


async def others_end(fleet: Meanwhile) -> None:
    for name in ("p1", "p2", "fixed"):
        await fleet.changes.drain(name, force=True)


async def no_longer_both(fleet: Meanwhile) -> None:
    config = fleet.router.config
    listed = [each.model_copy(update={"both_roles": False}) for each in config.prefill_instances]
    config.take(config.model_copy(update={"prefill_instances": listed}), ["prefill_instances"])


async def undrained(fleet: Meanwhile) -> None:
    await fleet.changes.undrain("p0")
    fleet.router.registry.work.reserve(fleet.router.registry.get("p0"))


async def cannot_be_made(fleet: Meanwhile) -> None:
    async def refuses(*_: Any) -> None:
        raise ValueError("p0: its api_key cannot be read")

    fleet.changes.turn = refuses  # type: ignore[method-assign]


@pytest.mark.parametrize("happens", [others_end, no_longer_both, undrained, cannot_be_made])
async def test_an_engine_that_was_told_in_vain_is_told_back(
    happens: Callable[[Meanwhile], Awaitable[object]],
) -> None:
    fleet = Meanwhile(happens)
    await fleet.look()
    assert not fleet.turned()
    assert fleet.told == [("p0", D), ("p0", P)]
    assert fleet.router.registry.get("p0").routable


@pytest.mark.parametrize("happens", [others_end, undrained])
async def test_one_whose_engine_keeps_the_other_role_gets_nothing(
    happens: Callable[[Meanwhile], Awaitable[object]],
) -> None:
    fleet = Meanwhile(happens, cannot_go_back=True)
    await fleet.look()
    assert fleet.told == [("p0", D), ("p0", P)]
    assert fleet.router.registry.get("p0").draining


@pytest.mark.parametrize("taken", [False, True])
async def test_an_engine_whose_turn_the_log_may_not_have_taken_gets_the_role_in_which_it_counts(
    fleet: Balanced, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    make = fleet.changes.turn

    async def unsure(*which: Any) -> None:
        if taken:
            await make(*which)
        raise NotShared("the connection was lost: it may count yet")

    monkeypatch.setattr(turning, "AGAIN_S", 0.01)
    monkeypatch.setattr(fleet.changes, "turn", unsure)
    await fleet.look()
    assert any(each.startswith("p0 was not turned: the log of the replicas") for each in fleet.said())
    role = D if taken else P
    await until(lambda: f"p0 serves again: it is a {role} instance" in fleet.said())
    assert fleet.told == ([("p0", D)] if taken else [("p0", D), ("p0", P)])
    assert (fleet.roles()["p0"], fleet.router.registry.get("p0").draining) == (role, False)


async def test_an_engine_that_cannot_go_back_when_the_log_takes_changes_gets_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def nothing(_: Meanwhile) -> None:
        pass

    async def refuses(*_: Any) -> None:
        raise NotShared("not connected")

    fleet = Meanwhile(nothing, cannot_go_back=True)
    monkeypatch.setattr(turning, "AGAIN_S", 0.01)
    monkeypatch.setattr(fleet.changes, "turn", refuses)
    await fleet.look()
    await until(lambda: any("its engine is not: /pd_role_switch" in each for each in fleet.said()))
    assert fleet.told == [("p0", D), ("p0", P)]
    assert fleet.router.registry.get("p0").draining


async def test_one_that_becomes_the_last_as_its_drain_begins_serves_again(fleet: Balanced) -> None:
    drains = fleet.changes.drain

    async def drain(name: str, **more: Any) -> None:
        await drains(name, **more)
        for other in ("p1", "p2", "fixed"):
            await drains(other, force=True)

    fleet.changes.drain = drain  # type: ignore[method-assign, assignment]
    await fleet.look()
    assert fleet.router.registry.get("p0").routable
    assert not fleet.told
    assert any(each.startswith("p0 was not turned: p0 is the last prefill") for each in fleet.said())
