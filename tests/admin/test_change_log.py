"""Operators' changes with several replicas: made by all, in one order, once, or refused."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.admin.test_saved_changes import CHANGES, D0, D1, P0, shape
from tests.support.channels import Meeting
from tests.support.replicas import FLEET, Scheduler, running
from tests.support.waiting import until
from vllm_pd_scheduler.admin import change_log, state_file
from vllm_pd_scheduler.admin.refusals import LastRoutable, NotShared
from vllm_pd_scheduler.admin.saved_changes import AdminState, SavedInstance
from vllm_pd_scheduler.admin.state_file import write_state
from vllm_pd_scheduler.fleet.registry import DuplicateInstance, UnknownInstance
from vllm_pd_scheduler.models import PD_ROLES, By, InstanceRole
from vllm_pd_scheduler.records.events import EventKind
from vllm_pd_scheduler.sync.channel import Change, NotKept

D9 = SavedInstance(id="d9", role=InstanceRole.DECODE, host="10.0.0.9", port=8000)
BOTH = {InstanceRole.PREFILL: "round_robin", InstanceRole.DECODE: "round_robin"}


@pytest.fixture
def meeting() -> Meeting:
    return Meeting()


def _ids(scheduler: Scheduler) -> set[str]:
    return {each.instance_id for each in scheduler.router.get_instances()}


def _draining(scheduler: Scheduler) -> set[str]:
    return {key for key in _ids(scheduler) if scheduler.router.membership.drained(key)}


def _same(*schedulers: Scheduler) -> bool:
    first, *others = (each.changes.state() for each in schedulers)
    return all(each == first for each in others)


async def test_each_change_is_made_by_all_and_undone_by_another(meeting: Meeting) -> None:
    one, two = Scheduler(meeting), Scheduler(meeting)
    async with running(one, two):
        await one.changes.use(BOTH)
        assert two.router.scheduler.strategies.name == "round_robin"
        await two.changes.use({InstanceRole.DECODE: "least_load"})
        assert one.router.scheduler.strategies.names[InstanceRole.DECODE] == "least_load"
        await one.changes.use_shadow("power_of_two")
        assert two.router.scheduler.strategies.shadow is not None
        await two.changes.use_shadow(None)
        assert one.router.scheduler.strategies.shadow is None
        await one.changes.drain("d0")
        assert _draining(two) == {"d0"}
        await two.changes.undrain("d0")
        assert _draining(one) == set()
        await one.changes.add(D9)
        assert "d9" in _ids(two)
        await two.changes.remove("d9")
        assert "d9" not in _ids(one)
        await one.changes.remove("d1")
        assert "d1" not in _ids(two)
        d1 = SavedInstance(id="d1", role=InstanceRole.DECODE, host="10.0.0.2", port=8001)
        await two.changes.add(d1)  # as it is configured, and is so again
        assert "d1" in _ids(one)
        assert _same(one, two)
        assert len(meeting.log) == 10


async def test_an_instance_that_is_put_elsewhere_is_put_there_by_all(meeting: Meeting) -> None:
    one, two = Scheduler(meeting), Scheduler(meeting)
    moved = SavedInstance(id="d1", role=InstanceRole.DECODE, host="10.0.0.7", port=8001)
    async with running(one, two):
        await one.changes.remove("d1")
        await one.changes.add(moved)
        assert two.router.registry.get("d1").instance.host == "10.0.0.7"
        await two.changes.remove("d1")
        assert "d1" not in _ids(one)
        assert _same(one, two)


async def test_an_instance_that_is_turned_is_turned_at_all(meeting: Meeting) -> None:
    both = [{**each, "both_roles": True} for each in FLEET["decode_instances"]]
    one, two = (Scheduler(meeting, decode_instances=both) for _ in range(2))
    async with running(one, two):
        await two.changes.drain("d1")
        await one.changes.turn("d1")
        assert two.router.registry.get("d1").instance.role is InstanceRole.PREFILL
        await two.changes.remove("d1", force=True)
        assert "d1" not in _ids(one)
        assert _same(one, two)


async def test_an_event_says_who_has_changed_what_at_which_replica(meeting: Meeting) -> None:
    one, two = Scheduler(meeting, "a"), Scheduler(meeting, "b")
    async with running(one, two):
        await one.changes.use(BOTH, by=f"{By.ADMIN} 192.0.2.1")
        event = next(each for each in two.router.events.after(0) if each.kind is EventKind.STRATEGY)
        assert event.text == "strategy is round_robin, no longer least_load"
        assert event.by == f"admin 192.0.2.1 at replica {one.sync.replica.name}"


async def test_changes_that_come_at_once_are_all_made_in_one_order(meeting: Meeting) -> None:
    three = [Scheduler(meeting) for _ in range(3)]
    items = [D9.model_copy(update={"id": f"x{n}", "port": 9000 + n}) for n in range(12)]
    async with running(*three):
        await asyncio.gather(*(three[n % 3].changes.add(item) for n, item in enumerate(items)))
        assert _same(*three)
        assert {item.id for item in items} < _ids(three[0])
        assert len(meeting.log) == len(items)  # each once


async def test_a_change_that_another_has_made_wrong_meanwhile_is_refused(meeting: Meeting) -> None:
    one, two = Scheduler(meeting), Scheduler(meeting)
    async with running(one, two):
        outcome = await asyncio.gather(one.changes.add(D9), two.changes.add(D9), return_exceptions=True)
        assert [type(each) for each in outcome].count(DuplicateInstance) == 1
        outcome = await asyncio.gather(
            one.changes.drain("p0"), two.changes.drain("p1"), return_exceptions=True
        )
        assert [type(each) for each in outcome].count(LastRoutable) == 1
        assert _same(one, two)


async def test_without_the_log_changes_are_refused_and_nothing_is_changed(meeting: Meeting) -> None:
    one = Scheduler(meeting)
    async with running(one):
        one.channel.lose("the server is gone")
        with pytest.raises(NotShared, match="the server is gone"):
            await one.changes.drain("d0")
        assert _draining(one) == set()
        one.channel.connect()
        await one.changes.drain("d0")


async def test_one_that_was_away_or_comes_late_makes_them_all(meeting: Meeting) -> None:
    one, two, late = (Scheduler(meeting) for _ in range(3))
    async with running(one, two):
        two.channel.lose()
        await one.changes.drain("d0")
        await one.changes.add(D9)
        await one.changes.use(BOTH)
        two.channel.connect()
        assert _same(one, two)
        async with running(late):
            assert _same(one, late)


async def test_one_that_does_not_know_an_instance_keeps_that_it_drains(meeting: Meeting) -> None:
    one, two = Scheduler(meeting), Scheduler(meeting, decode_instances=FLEET["decode_instances"][1:])
    async with running(one, two):
        await one.changes.drain("d0")
        await two.changes.use(BOTH)
        assert _draining(one) == {"d0"}
        await two.changes.drain("d1", force=True)
        assert _draining(one) == {"d0", "d1"}


async def test_what_an_emptied_server_has_lost_is_put_back(meeting: Meeting) -> None:
    one, two = Scheduler(meeting), Scheduler(meeting)
    async with running(one, two):
        await one.changes.drain("d0")
        meeting.empty()
        one.channel.lose()
        two.channel.lose()
        two.channel.connect()
        one.channel.connect()
        await until(lambda: meeting.log)
        await two.changes.use(BOTH)
        assert _draining(one) == _draining(two) == {"d0"}
        late = Scheduler(meeting)
        async with running(late):
            assert _draining(late) == {"d0"}


async def test_a_file_of_long_ago_does_not_come_before_what_others_know(
    meeting: Meeting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(change_log, "FROM_FILE_S", 1.0)
    path = tmp_path / "state.json"
    old, one = Scheduler(meeting, state_file=str(path)), Scheduler(meeting)
    async with running(old):
        await old.changes.use(BOTH)
        await until(path.exists)
    async with running(one):
        await one.changes.drain("d0")
        meeting.empty()
        one.channel.lose()
        again = Scheduler(meeting, state_file=str(path))
        again.changes.restore()
        assert not _draining(again)
        async with running(again):
            await asyncio.sleep(0.01)
            one.channel.connect()
            await until(lambda: meeting.log)
            await asyncio.sleep(1.1)
            assert _draining(one) == _draining(again) == {"d0"}


async def test_what_an_emptied_server_does_not_take_back_is_put_there_later(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server whose disk is full, say: a replica that starts later must not begin as configured."""
    monkeypatch.setattr(change_log, "AGAIN_S", 0.02)
    one, late = Scheduler(meeting), Scheduler(meeting)
    async with running(one):
        await one.changes.drain("d0")
        append, tried = one.channel.append, 0

        async def refused(data: bytes, expected: str) -> str:
            nonlocal tried
            tried += 1
            raise NotKept("the server says: MISCONF")

        monkeypatch.setattr(one.channel, "append", refused)
        meeting.empty()
        one.channel.lose()
        one.channel.connect()
        await until(lambda: tried > 2)
        assert caplog.text.count("cannot be put back into the log") == 1
        monkeypatch.setattr(one.channel, "append", append)
        await until(lambda: meeting.log)
        async with running(late):
            assert _draining(late) == {"d0"}


async def test_the_file_follows_the_log_and_counts_where_that_is_empty(
    meeting: Meeting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    one, two = Scheduler(meeting), Scheduler(meeting, state_file=str(path))
    async with running(one, two):
        await one.changes.drain("d0")
        await until(lambda: path.exists() and json.loads(path.read_text())["drained"] == ["d0"])
    meeting.empty()
    meeting.channels.clear()
    monkeypatch.setattr(change_log, "FROM_FILE_S", 0.0)
    again, other = Scheduler(meeting, state_file=str(path)), Scheduler(meeting)
    again.changes.restore()
    async with running(again, other):
        await until(lambda: _draining(other) == {"d0"})


async def test_the_file_is_written_once_at_a_time_and_never_goes_back(
    meeting: Meeting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Scheduler(meeting, state_file=str(tmp_path / "state.json"))
    one.changes.file_first = True
    written: list[list[str]] = []
    busy = threading.Lock()

    def slow(path: Path, state: AdminState) -> None:
        assert busy.acquire(blocking=False), "two write the file at once"
        time.sleep(0.02)  # so that whoever does not wait comes in between
        write_state(path, state)
        written.append(sorted(state.drained))
        busy.release()

    monkeypatch.setattr(state_file, "write_state", slow)
    async with running(one):
        await one.changes.drain("d0")
        await one.changes.drain("p0")
        await one.changes.use(BOTH)
        await until(
            lambda: json.loads((tmp_path / "state.json").read_text()).get("strategy") == "round_robin"
        )
    assert written[0] == ["d0"]
    assert all(before <= after for before, after in itertools.pairwise(written))
    assert os.listdir(tmp_path) == ["state.json"]


async def test_a_change_of_another_version_is_not_overwritten(
    meeting: Meeting, caplog: pytest.LogCaptureFixture
) -> None:
    one = Scheduler(meeting)
    async with running(one):
        await one.changes.drain("d0")
        entry = json.loads(meeting.log[-1].data)
        for data in (json.dumps({**entry, "version": 2, "id": "x"}).encode(), b"\xff garbage"):
            meeting.log.append(Change(f"later {len(meeting.log)}", data))
            one.channel.lose()
            one.channel.connect()
            with pytest.raises(NotShared, match="cannot be read"):
                await one.changes.undrain("d0")
        assert _draining(one) == {"d0"}
    assert sum("cannot read" in each.message for each in caplog.records) == 2


async def test_what_cannot_be_made_here_is_said_and_the_rest_is_made(
    meeting: Meeting, caplog: pytest.LogCaptureFixture
) -> None:
    clash = {**FLEET, "decode_instances": [*FLEET["decode_instances"], {"id": "d9", "host": "h", "port": 1}]}
    one, two = Scheduler(meeting), Scheduler(meeting, **clash)
    async with running(one, two):
        await one.changes.add(D9)
        await one.changes.drain("d0")
        assert two.router.registry.get("d9").instance.host == "h"
        assert _draining(two) == {"d0"}
    assert any("is not made here: added: 'd9'" in each.message for each in caplog.records)


async def _change(one: Scheduler, kind: str, value: Any) -> None:
    """Do one change as the admin interface does; one that is impossible changes nothing."""
    kept = one.changes
    calls: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
        "use": lambda: kept.use(dict.fromkeys(PD_ROLES, value)),
        "use_each": lambda: kept.use(value),
        "shadow": lambda: kept.use_shadow(value),
        "drain": lambda: kept.drain(value, force=True),
        "undrain": lambda: kept.undrain(value),
        "add": lambda: kept.add(value),
        "remove": lambda: kept.remove(value, force=True),
    }
    with contextlib.suppress(DuplicateInstance, UnknownInstance):
        await calls[kind]()


@given(CHANGES, st.lists(st.integers(0, 1), min_size=20, max_size=20), st.integers(0, 20))
def test_whatever_is_changed_where_all_end_alike(
    changes: list[tuple[str, Any]], where: list[int], away_from: int
) -> None:
    """Two make changes in turns, a third is away from some time on, and a fourth comes at the end."""
    settings = {"prefill_instances": [P0], "decode_instances": [D0, D1], "decode_strategy": "weighted"}
    settings |= {"shadow_strategy": "slo", "strategy": "least_load"}

    async def run() -> None:
        meeting = Meeting()
        one, two, away, late = (Scheduler(meeting, **settings) for _ in range(4))
        async with running(one, two, away):
            for number, (kind, value) in enumerate(changes):
                if number == away_from:
                    away.channel.lose()
                await _change((one, two)[where[number]], kind, value)
            away.channel.connect()
            async with running(late):
                assert shape(one.router) == shape(two.router) == shape(away.router) == shape(late.router)
                assert _same(one, two, away, late)

    asyncio.run(run())
