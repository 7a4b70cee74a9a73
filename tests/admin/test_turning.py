"""An instance gets the other role: drained first, one at a time, and never the last of a role."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.support.admin import Admin
from tests.support.waiting import until
from vllm_pd_scheduler.admin import turning
from vllm_pd_scheduler.admin.changes import AdminChanges
from vllm_pd_scheduler.admin.refusals import NotKept, NotShared
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.models import InstanceRole, PDInstance
from vllm_pd_scheduler.router import PDRouter

P, D = InstanceRole.PREFILL, InstanceRole.DECODE


def configuration(**more: Any) -> dict[str, Any]:
    def listed(role: str, count: int) -> list[dict[str, Any]]:
        return [
            {"id": f"{role}{n}", "host": f"10.0.0.{n + 1}", "port": port, "both_roles": True, "models": ["m"]}
            for port in ({"p": 8100, "d": 8200}[role],)
            for n in range(count)
        ]

    fixed = {"id": "fixed", "host": "10.0.9.9", "port": 1}
    return {"prefill_instances": [*listed("p", 3), fixed], "decode_instances": listed("d", 2), **more}


class Fleet(Admin):
    """Three P and two D that can be turned, and a P that cannot."""

    def __init__(self, **more: Any) -> None:
        self.router = PDRouter(SchedulerConfig.model_validate(configuration(**more)))
        self.ready = True
        self.healthy(*(each.instance_id for each in self.router.get_instances()))

    def role(self, name: str) -> InstanceRole:
        return self.router.registry.get(name).instance.role

    def said(self) -> list[str]:
        return [each.text for each in self.router.events.after(0)]


@pytest_asyncio.fixture
async def fleet() -> AsyncIterator[Fleet]:
    found = Fleet()
    await found.serve()
    yield found
    await found.client.close()


async def turn(fleet: Fleet, name: str, wait: bool = True) -> tuple[int, Any]:
    return await fleet.ask("POST", f"/instances/{name}/turn{'?wait=true' if wait else ''}")


async def test_an_idle_instance_is_turned_at_once_and_back(fleet: Fleet) -> None:
    status, found = await turn(fleet, "p0")
    assert (status, found["role"], found["state"]) == (200, "decode", "starting")
    instance = fleet.router.registry.get("p0").instance
    assert (instance.host, instance.port, instance.models) == ("10.0.0.1", 8100, frozenset({"m"}))
    assert "p0 was turned: it is a decode instance now" in fleet.said()
    fleet.healthy("p0")
    assert len(fleet.router.registry.routable(D)) == 3
    status, found = await turn(fleet, "p0")
    assert (status, found["role"]) == (200, "prefill")
    assert fleet.router.membership.removed() == []


async def test_what_runs_there_ends_first(fleet: Fleet) -> None:
    held = fleet.router.registry.work.reserve(fleet.router.registry.get("p0"))
    status, found = await turn(fleet, "p0", wait=False)
    assert (status, found["role"], found["state"]) == (202, "prefill", "draining")
    held.release()
    await until(lambda: fleet.role("p0") is D)


async def test_a_hand_off_that_was_not_fetched_is_left_there(fleet: Fleet) -> None:
    endpoint = fleet.router.registry.get("p0")
    endpoint.keep_handoff()
    await turn(fleet, "p0", wait=False)
    assert not endpoint.drained
    endpoint.end_handoff()
    await until(lambda: fleet.role("p0") is D)


async def test_one_at_a_time(fleet: Fleet) -> None:
    held = fleet.router.registry.work.reserve(fleet.router.registry.get("p0"))
    await turn(fleet, "p0", wait=False)
    status, found = await turn(fleet, "p1")
    assert status == 409
    assert found["error"].startswith("p0 is being turned, and only one is at a time")
    assert fleet.router.registry.get("p1").routable, "nothing was changed"
    held.release()
    await until(lambda: fleet.role("p0") is D)
    assert (await turn(fleet, "p1"))[0] == 200


async def test_undrain_ends_it(fleet: Fleet) -> None:
    held = fleet.router.registry.work.reserve(fleet.router.registry.get("p0"))
    await turn(fleet, "p0", wait=False)
    assert (await fleet.ask("POST", "/instances/p0/undrain"))[0] == 200
    await until(lambda: "p0 was not turned: it was undrained" in fleet.said())
    held.release()
    assert (fleet.role("p0"), fleet.router.registry.get("p0").routable) == (P, True)


async def test_the_last_of_a_role_stays(fleet: Fleet) -> None:
    fleet.router.drain_instance("d1")
    for name in ("d0", "d1"):
        status, found = await turn(fleet, name)
        if name == "d0":
            assert (status, found["error"]) == (409, "d0 is the last decode instance that can serve")
            assert fleet.router.registry.get("d0").routable
        else:
            assert (status, found["role"]) == (200, "prefill"), "it served nobody anyway"


async def test_one_that_has_become_the_last_serves_again(fleet: Fleet) -> None:
    held = fleet.router.registry.work.reserve(fleet.router.registry.get("d0"))
    await turn(fleet, "d0", wait=False)
    fleet.router.drain_instance("d1")
    held.release()
    await until(lambda: "d0 was not turned: d0 is the last decode instance that can serve" in fleet.said())
    assert (fleet.role("d0"), fleet.router.registry.get("d0").routable) == (D, True)


async def test_what_cannot_be_turned(fleet: Fleet) -> None:
    fleet.router.membership.update("dns:x", [PDInstance("found", D, "10.0.7.7", 1)])
    for name, says in (
        ("fixed", "fixed has no both_roles"),
        ("found", "found is named by dns:x: change its role there"),
        ("nobody", "nobody"),
    ):
        status, found = await turn(fleet, name)
        assert status == (404 if name == "nobody" else 409)
        assert says in found["error"]


async def test_one_that_is_removed_meanwhile(fleet: Fleet) -> None:
    held = fleet.router.registry.work.reserve(fleet.router.registry.get("p0"))
    await turn(fleet, "p0", wait=False)
    assert (await fleet.ask("DELETE", "/instances/p0"))[0] == 204
    await until(lambda: "p0 was not turned: it was removed" in fleet.said())
    held.release()
    assert (await turn(fleet, "p1"))[0] == 200


def refuse(patch: pytest.MonkeyPatch, *changes: str, error: Exception | None = None) -> None:
    """Have no change of these kinds be kept, and a turn that is not kept be undone soon."""

    async def refuses(*_: Any, **__: Any) -> None:
        raise error or NotShared("10.0.0.5:6379: connection refused")

    patch.setattr(turning, "AGAIN_S", 0.01)
    for name in changes:
        patch.setattr(AdminChanges, name, refuses)


async def test_one_whose_turn_the_log_of_the_replicas_refuses_serves_again_when_it_takes_changes(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "turn", "undrain")
    status, _ = await turn(fleet, "p0")
    assert status == 202, "whoever waits for the turn does not wait for the log"
    (said,) = (each for each in fleet.said() if each.startswith("p0 was not turned"))
    assert "10.0.0.5:6379: connection refused" in said
    assert "stays drained" in said
    assert fleet.router.registry.get("p0").draining
    monkeypatch.undo()
    await until(lambda: "p0 serves again: it is a prefill instance" in fleet.said())
    assert fleet.router.registry.get("p0").routable
    await until_over(fleet)
    assert (await turn(fleet, "p0"))[1]["role"] == "decode", "and once more"


async def until_over(fleet: Fleet) -> None:
    """Wait until another turn may begin."""

    async def over() -> bool:
        status, found = await turn(fleet, "fixed")
        return status == 409 and "no both_roles" in found["error"]

    await until(over)


async def test_one_that_is_kept_drained_since_no_change_is_kept_can_be_undrained(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "turn", "drain", error=NotShared("not connected"))
    fleet.router.drain_instance("p0")
    assert (await turn(fleet, "p0"))[0] == 503, "its drain is not kept"
    monkeypatch.undo()
    refuse(monkeypatch, "turn", "undrain", error=NotKept("No space left on device"))
    await turn(fleet, "p0")
    assert fleet.router.registry.get("p0").draining
    fleet.router.undrain_instance("p0")
    monkeypatch.undo()
    await until(lambda: "p0 serves again: it is a prefill instance" in fleet.said())
    assert fleet.router.registry.get("p0").routable


async def test_one_that_an_operator_has_added_is_turned_too(fleet: Fleet) -> None:
    body = {"id": "new", "role": "decode", "host": "10.0.5.5", "port": 9, "both_roles": True}
    assert (await fleet.ask("POST", "/instances", body))[0] == 201
    fleet.healthy("new")
    assert (await turn(fleet, "new"))[1]["role"] == "prefill"


async def test_a_restart_keeps_the_role(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    fleet = Fleet(state_file=str(path))
    await fleet.serve()
    assert (await turn(fleet, "p0"))[0] == 200
    fleet.healthy("p0")
    saved = json.loads(path.read_text())
    assert [(each["id"], each["role"]) for each in saved["added"]] == [("p0", "decode")]
    again = Fleet(state_file=str(path))
    AdminChanges(again.router).restore()
    assert again.role("p0") is D
    assert again.router.registry.get("p0").instance.models == frozenset({"m"})
    assert (await turn(fleet, "p0"))[0] == 200
    assert json.loads(path.read_text()) == {"version": 1, "removed": [], "added": [], "drained": []}
    await fleet.client.close()


async def test_the_end_of_the_scheduler_ends_it() -> None:
    fleet = Fleet()
    await fleet.serve()
    fleet.router.registry.work.reserve(fleet.router.registry.get("p0"))
    await turn(fleet, "p0", wait=False)
    await fleet.client.close()
    assert fleet.role("p0") is P
