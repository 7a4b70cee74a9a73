"""A change is kept or refused: nothing in between, whatever the disk does."""

import asyncio
import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import pytest_asyncio
from aiohttp.test_utils import TestClient, TestServer

from tests.support.waiting import until
from vllm_pd_scheduler.admin import AdminServer, changes
from vllm_pd_scheduler.admin.changes import AdminChanges
from vllm_pd_scheduler.admin.refusals import NotKept
from vllm_pd_scheduler.admin.saved_changes import SavedInstance, Steered, difference
from vllm_pd_scheduler.admin.state_file import read_state
from vllm_pd_scheduler.config import parse_config
from vllm_pd_scheduler.fleet.registry import DuplicateInstance, UnknownInstance
from vllm_pd_scheduler.models import InstanceRole
from vllm_pd_scheduler.router import PDRouter

FLEET = {
    "prefill_instances": [{"id": "p0", "host": "10.0.0.1", "port": 8100}],
    "decode_instances": [{"id": "d0", "host": "10.0.0.2", "port": 8200}],
}
NEW = SavedInstance(id="d2", role=InstanceRole.DECODE, host="10.0.0.4", port=8200)

Make = Callable[[AdminChanges], Coroutine[Any, Any, None]]
EACH: dict[str, Make] = {
    "use": lambda kept: kept.use({InstanceRole.DECODE: "weighted"}),
    "shadow": lambda kept: kept.use_shadow("slo"),
    "add": lambda kept: kept.add(NEW),
    "remove": lambda kept: kept.remove("d0"),
    "drain": lambda kept: kept.drain("d0"),
    "undrain": lambda kept: kept.undrain("p0"),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.json"


@pytest.fixture
def router(path: Path) -> PDRouter:
    return PDRouter(parse_config({**FLEET, "state_file": str(path)}))


@pytest_asyncio.fixture
async def kept(router: PDRouter) -> AdminChanges:
    made = AdminChanges(router)
    await made.drain("p0")
    return made


def content(path: Path) -> bytes:
    return path.read_bytes()


def write(path: Path, text: str) -> None:
    path.write_text(text)


def now(router: PDRouter) -> Any:
    """All of a router that a change could change."""
    return Steered.of(router, []), list(router.registry), router.scheduler.strategies.shadow


@contextmanager
def broken_disk(error: int = 28) -> Iterator[None]:
    with mock.patch("os.fsync", side_effect=OSError(error, os.strerror(error))):
        yield


@pytest.mark.parametrize("call", ["os.open", "os.fsync", "os.replace"])
@pytest.mark.parametrize("make", EACH.values(), ids=list(EACH))
async def test_what_cannot_be_kept_is_not_made(
    router: PDRouter, kept: AdminChanges, path: Path, make: Make, call: str
) -> None:
    before, written = now(router), content(path)
    with (
        mock.patch(call, side_effect=OSError(28, "No space left on device")),
        pytest.raises(NotKept, match="No space left on device"),
    ):
        await make(kept)
    assert now(router) == before
    assert content(path) == written
    assert os.listdir(path.parent) == [path.name]
    await make(kept)  # with room again
    assert now(router) != before


async def test_what_cannot_be_made_is_not_kept(router: PDRouter, kept: AdminChanges, path: Path) -> None:
    written = content(path)
    double = NEW.model_copy(update={"host": "10.0.0.2"})
    of_the_other_role = NEW.model_copy(update={"host": "10.0.0.1", "port": 8100})
    for error, change in (
        (DuplicateInstance, kept.add(double)),
        (DuplicateInstance, kept.add(of_the_other_role)),
        (UnknownInstance, kept.remove("nobody")),
        (UnknownInstance, kept.drain("nobody")),
        (ValueError, kept.use({InstanceRole.DECODE: "nothing"})),
        (ValueError, kept.use_shadow("nothing")),
    ):
        with pytest.raises(error):
            await change
        assert content(path) == written


async def test_one_after_another(router: PDRouter, kept: AdminChanges, path: Path) -> None:
    """Of those that exclude each other one is made, and the file has all that were."""
    others = [NEW.model_copy(update={"id": f"n{n}", "port": 9000 + n}) for n in range(5)]
    made = await asyncio.gather(
        kept.add(NEW),
        kept.add(NEW),
        *(kept.add(each) for each in others),
        kept.remove("d0"),
        kept.remove("d0"),
        return_exceptions=True,
    )
    assert [type(each) for each in made if each] == [DuplicateInstance, UnknownInstance]
    state = read_state(path)
    assert state is not None
    assert [each.id for each in state.added] == ["d2", *(each.id for each in others)]
    assert [each.id for each in state.removed] == ["d0"]


async def test_the_directory_is_synced_too(kept: AdminChanges) -> None:
    synced = []
    with mock.patch("os.fsync", side_effect=lambda fd: synced.append(os.fstat(fd).st_mode)):
        await kept.drain("d0")
    assert [stat.S_ISDIR(mode) for mode in synced] == [False, True]


async def test_what_a_killed_write_left_is_no_obstacle(kept: AdminChanges, path: Path) -> None:
    write(path.with_name(f".{path.name}.new"), "{")
    await kept.drain("d0")
    assert os.listdir(path.parent) == [path.name]


async def test_a_bad_file_that_cannot_be_renamed_refuses_all(router: PDRouter, path: Path) -> None:
    write(path, "{")
    os.mkdir(f"{path}.corrupt")
    kept = AdminChanges(router)
    kept.restore()
    before = now(router)
    for make in EACH.values():
        with pytest.raises(NotKept, match="it cannot be renamed"):
            await make(kept)
    assert now(router) == before
    assert content(path) == b"{"


class TestHungDisk:
    """A write that does not return holds up its change, which is refused, and nothing else."""

    @pytest_asyncio.fixture
    async def awake(
        self, kept: AdminChanges, monkeypatch: pytest.MonkeyPatch
    ) -> AsyncIterator[threading.Event]:
        awake = threading.Event()

        def hang(_: int) -> None:
            awake.wait(30)

        monkeypatch.setattr("os.fsync", hang)
        monkeypatch.setattr(changes, "KEEP_S", 0.05)
        yield awake
        awake.set()

    async def test_it_is_refused_and_the_file_put_right(
        self, router: PDRouter, kept: AdminChanges, path: Path, awake: threading.Event
    ) -> None:
        before = now(router)
        for make in EACH.values():  # those that wait behind it too
            with pytest.raises(NotKept, match="the disk has not answered"):
                await make(kept)
        assert now(router) == before
        awake.set()

        async def as_it_is() -> bool:
            return not kept._one_at_a_time.locked()

        await until(as_it_is)
        assert read_state(path) == difference(Steered.of(router, []), router.config)
        await kept.drain("d0")
        assert router.registry.get("d0").draining

    async def test_one_that_is_cancelled(
        self, router: PDRouter, kept: AdminChanges, path: Path, awake: threading.Event
    ) -> None:
        written, before = content(path), now(router)
        change = asyncio.ensure_future(kept.drain("d0"))
        await asyncio.sleep(0)
        change.cancel()
        awake.set()

        async def as_it_is() -> bool:
            return change.done() and not kept._one_at_a_time.locked()

        await until(as_it_is)
        assert now(router) == before
        assert content(path) == written


async def test_over_http(router: PDRouter, kept: AdminChanges) -> None:
    server = AdminServer(router, kept, is_ready=lambda: True)
    async with TestClient(TestServer(server.application())) as client:
        with broken_disk():
            for method, url, body in (
                ("PUT", "/strategy", {"strategy": "weighted"}),
                ("PUT", "/shadow", {"strategy": "weighted"}),
                ("DELETE", "/shadow", None),
                ("POST", "/instances", NEW.model_dump(mode="json", exclude_none=True)),
                ("DELETE", "/instances/d0", None),
                ("POST", "/instances/d0/drain", None),
                ("POST", "/instances/p0/undrain", None),
            ):
                async with client.request(method, url, json=body) as answer:
                    assert answer.status == 507, url
                    assert (await answer.json())["error"].endswith("No space left on device")
        async with client.post("/instances/d0/drain") as answer:
            assert answer.status == 202


SIXTY = """
import asyncio, json, os, resource, sys
from vllm_pd_scheduler.admin.changes import AdminChanges
from vllm_pd_scheduler.admin.refusals import NotKept
from vllm_pd_scheduler.admin.saved_changes import SavedInstance
from vllm_pd_scheduler.config import parse_config
from vllm_pd_scheduler.models import InstanceRole
from vllm_pd_scheduler.router import PDRouter

path, fault = sys.argv[1:]
fleet = json.loads(sys.stdin.read())
router = PDRouter(parse_config({**fleet, "state_file": path}))
kept = AdminChanges(router)
if fault == "file size":
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
elif fault == "read only" and os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)

async def main():
    taken = []
    for port in range(1, 61):
        try:
            await kept.add(SavedInstance(id=f"n{port}", role=InstanceRole.DECODE, host="h", port=port))
        except NotKept:
            continue
        taken.append(f"n{port}")
    return taken

taken = asyncio.run(main())
again = PDRouter(router.config)
AdminChanges(again).restore()
present = lambda router: sorted({i.instance_id for i in router.get_instances()} - {"p0", "d0"})
print(json.dumps([sorted(taken), present(router), present(again)]))
"""


def sixty(path: Path, fault: str) -> list[str]:
    """Add sixty instances in a process of its own; return the ids that were taken: a restart has them too."""
    ended = subprocess.run(
        [sys.executable, "-c", SIXTY, str(path), fault],
        input=json.dumps(FLEET),
        capture_output=True,
        text=True,
        check=True,
    )
    taken, there, again = json.loads(ended.stdout)
    assert taken == there == again
    return list(taken)


def test_a_limit_of_the_files_size(path: Path) -> None:
    assert 0 < len(sixty(path, "file size")) < 60


def test_a_directory_that_is_read_only() -> None:
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o555)
    try:
        assert sixty(directory / "state.json", "read only") == []
    finally:
        directory.rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a disk as small as that")
def test_a_full_disk(path: Path) -> None:
    disk = path.parent / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        assert 0 < len(sixty(disk / "state.json", "none")) < 60
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_nothing_is_kept_without_a_state_file(tmp_path: Path) -> None:
    router = PDRouter(parse_config(FLEET))
    kept = AdminChanges(router)
    asyncio.run(kept.drain("d0"))
    assert router.registry.get("d0").draining
