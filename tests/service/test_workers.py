"""The parent of workers: what it does with a process that ends."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from unittest import mock

import pytest
import pytest_asyncio

from tests.support.processes import running
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.config.replicas import ReplicasConfig
from vllm_pd_scheduler.service import run_workers, workers
from vllm_pd_scheduler.service.run_workers import addresses, serve_with_workers
from vllm_pd_scheduler.service.startup_error import StartupError
from vllm_pd_scheduler.service.worker import FirstWorker, Worker
from vllm_pd_scheduler.service.workers import WorkerEnded, Workers

SERVES = """
import asyncio, os, sys, time
from vllm_pd_scheduler.sync.local import tell_ready
hub, ending, index = sys.argv[1], sys.argv[2], sys.argv[4]
open(f"{hub}.started", "a").write(f"w{index} {os.getpid()} {time.monotonic()}\\n")
asyncio.run(tell_ready(hub, f"w{index}"))
if ending == "at once" and index == "1":
    sys.exit(3)
time.sleep(600)
"""
FIRST = """
import fcntl, sys, time
lock = open(f"{sys.argv[1]}.first", "a")
fcntl.flock(lock, fcntl.LOCK_EX)
open(f"{sys.argv[1]}.locked", "a")
time.sleep(600)
"""
STARTS_SLOWLY = """
import asyncio, os, signal, sys, time
from vllm_pd_scheduler.sync.local import tell_ready
hub, index = sys.argv[1], sys.argv[4]
open(f"{hub}.begun", "a").write(f"w{index}\\n")
while not os.path.exists(f"{hub}.go"):
    time.sleep(0.01)
signal.signal(signal.SIGHUP, lambda *_: open(f"{hub}.told", "a").write(f"w{index}\\n"))
asyncio.run(tell_ready(hub, f"w{index}"))
while True:
    time.sleep(600)
"""
HANGS = """
import asyncio, os, sys, time
from vllm_pd_scheduler.sync.local import tell_alive, tell_ready
hub, ending, index = sys.argv[1], sys.argv[2], sys.argv[4]
open(f"{hub}.started", "a").write(f"w{index} {os.getpid()} {time.monotonic()}\\n")
async def serve():
    await tell_ready(hub, f"w{index}")
    await tell_alive(hub, f"w{index}")
asyncio.run(serve())
"""
DRAINS = """
import asyncio, os, signal, sys, time
from vllm_pd_scheduler.sync.local import leave_together, tell_ready
hub, index = sys.argv[1], sys.argv[4]
open(f"{hub}.started", "a").write(f"w{index} {os.getpid()} {time.monotonic()}\\n")
async def serve():
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
    await tell_ready(hub, f"w{index}")
    await asked.wait()
    await leave_together(hub, f"w{index}")
asyncio.run(serve())
"""
FAILS = "import sys; sys.exit(5)"


def command(script: str, path: Path, ending: str = "never") -> list[str]:
    return [sys.executable, "-c", script, str(path), ending]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hub"


def started(path: Path) -> list[tuple[str, int, float]]:
    file = path.with_name("hub.started")
    lines = file.read_text().splitlines() if file.exists() else []
    return [(name, int(pid), float(at)) for name, pid, at in map(str.split, lines)]


@pytest_asyncio.fixture
async def two(path: Path) -> AsyncIterator[Workers]:
    async with Workers(2, command(SERVES, path), str(path)) as found:
        yield found


async def test_all_serve_and_all_end(path: Path) -> None:
    async with Workers(3, command(SERVES, path), str(path)) as found:
        pids = found.pids
        assert sorted(pids) == ["w0", "w1", "w2"]
        assert started(path)[0][0] == "w0", "the first says what is wrong, alone"
    assert not any(map(running, pids.values()))
    await until(lambda: not path.exists())


async def test_one_that_dies_is_started_again(
    path: Path, two: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    before = two.pids["w1"]
    two._processes[1].send_signal(signal.SIGKILL)
    await until(lambda: two.pids.get("w1", before) != before and len(started(path)) == 3)
    assert f"worker w1 (process {before}) was ended by SIGKILL: starting it again" in caplog.text


async def test_one_that_somebody_ends_alone_leaves_when_it_has_drained(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with Workers(2, command(DRAINS, path), str(path)) as found:
        before = found.pids
        found._processes[1].send_signal(signal.SIGTERM)
        await until(lambda: found.pids.get("w1", before["w1"]) != before["w1"] and len(started(path)) == 3)
        assert found.pids["w0"] == before["w0"]
        assert not found._drained, "when all end, the new one may have requests"
    assert f"worker w1 (process {before['w1']}) ended with status 0: starting it again" in caplog.text


async def test_one_that_hangs_is_ended_and_started_again(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with Workers(2, command(HANGS, path), str(path)) as found:
        await until(lambda: found._looks.keys() == {"w0", "w1"})
        before = found.pids
        found._processes[0].send_signal(signal.SIGSTOP)
        await until(lambda: found.pids.get("w0", before["w0"]) != before["w0"] and len(started(path)) == 3)
        assert found.pids["w1"] == before["w1"]
    assert f"worker w0 (process {before['w0']}) hangs: it is ended" in caplog.text


async def test_one_that_hangs_at_its_start_is_ended_too(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The second time it is started it hangs, and the third time it does not."""
    hangs = f"if len(open(f'{{hub}}.started').readlines()) == 3: time.sleep({HUNG_S})\n"
    script = HANGS.replace("async def serve", f"{hangs}async def serve")
    async with Workers(2, command(script, path), str(path)) as found:
        with mock.patch.object(workers, "START_S", 4.0):
            found._processes[1].send_signal(signal.SIGKILL)
            await until(lambda: len(started(path)) >= 4)
    assert f"worker w1 (process {started(path)[2][1]}) hangs: it is ended" in caplog.text


async def test_one_that_ends_at_once_is_started_ever_later(path: Path) -> None:
    with (
        mock.patch.object(workers, "FIRST_PAUSE_S", 0.02),
        mock.patch.object(workers, "LONGEST_PAUSE_S", 0.1),
    ):
        async with Workers(2, command(SERVES, path, "at once"), str(path)) as found:
            await until(lambda: len(started(path)) >= 6)
            assert "w0" in found.pids
    times = [at for name, _, at in started(path) if name == "w1"]
    assert all(b - a >= pause for a, b, pause in zip(times, times[1:], (0.02, 0.04, 0.08, 0.1), strict=False))


@pytest.mark.parametrize("script", [FAILS, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
async def test_one_that_cannot_start_ends_all(path: Path, script: str) -> None:
    with pytest.raises(WorkerEnded, match="at its start"):
        async with Workers(2, command(script, path), str(path)):
            pass
    await until(lambda: not path.exists())


async def test_a_signal_while_they_start_ends_all(path: Path) -> None:
    starting = Workers(2, command("import time; time.sleep(600)", path), str(path))
    entering = asyncio.ensure_future(starting.__aenter__())
    await until(lambda: bool(starting.pids))
    (pid,) = starting.pids.values()
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    assert not running(pid)


def lines(path: Path, name: str) -> list[str]:
    file = path.with_name(f"hub.{name}")
    return sorted(file.read_text().split()) if file.exists() else []


async def test_a_hangup_while_they_start_ends_none_and_reaches_all(path: Path) -> None:
    """A process that has just begun would end of the signal: all of the start, for a reload."""
    starting = Workers(2, command(STARTS_SLOWLY, path), str(path))
    entering = asyncio.ensure_future(starting.__aenter__())
    try:
        await until(lambda: lines(path, "begun") == ["w0"])
        starting.signal(signal.SIGHUP)
        path.with_name("hub.go").touch()
        await entering
        await until(lambda: lines(path, "told") == ["w0"])
        path.with_name("hub.go").unlink()
        starting._processes[1].kill()
        await until(lambda: lines(path, "begun") == ["w0", "w1", "w1"])
        starting.signal(signal.SIGHUP)
        path.with_name("hub.go").touch()
        await until(lambda: lines(path, "told") == ["w0", "w0", "w1"])
        assert lines(path, "begun") == ["w0", "w1", "w1"]
    finally:
        await starting.stop()


def test_each_has_addresses_of_its_own() -> None:
    config = SchedulerConfig(grpc_port=9100, metaserver_port=9200)
    assert [(each.address, each.name) for each in addresses(config, 3)] == [
        ("127.0.0.1:9100", "w0"),
        ("127.0.0.1:9101", "w1"),
        ("127.0.0.1:9102", "w2"),
    ]
    own = Worker(2, 3, "").own_ports(config)
    assert (own.grpc_port, own.metaserver_port, own.admin_port) == (9102, 9202, config.admin_port)
    sockets = addresses(SchedulerConfig(grpc_socket="/run/pd.sock"), 2)
    assert [each.address for each in sockets] == ["/run/pd.sock", "/run/pd.sock.1"]
    named = SchedulerConfig(replicas=ReplicasConfig(url="valkey://x", name="a"))
    assert [each.name for each in addresses(named, 2)] == ["aw0", "aw1"]


async def test_what_cannot_be_is_said_before_a_worker_starts() -> None:
    for config, said in (
        (SchedulerConfig(grpc_port=65535), "grpc_port of worker w1 would be 65536"),
        (SchedulerConfig(grpc_port=9002, admin_port=9003), "9003 is where admin_port .*another grpc_port"),
        (SchedulerConfig(replicas=ReplicasConfig(url="valkey://x", name="a" * 15)), "replicas.name: 'a*w1'"),
    ):
        with pytest.raises(StartupError, match=said):
            await serve_with_workers(config, Path("none"), 2, [])


async def test_a_directory_whose_path_is_too_long_for_sockets(tmp_path: Path) -> None:
    place = tmp_path / ("x" * 90)
    place.mkdir()
    with mock.patch.object(run_workers, "private_socket_path") as made:
        made.return_value.__enter__.return_value = str(place / "grpc")
        with pytest.raises(StartupError, match="more than 107 bytes"):
            await serve_with_workers(SchedulerConfig(grpc_socket="/run/x"), Path("none"), 2, [])


async def test_the_first_is_one_and_the_next_when_it_has_ended(path: Path) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", FIRST, str(path))
    try:
        await until(path.with_name("hub.locked").exists)
        first = FirstWorker(Worker(1, 2, str(path)))
        assert not first.now()
        waiting = asyncio.ensure_future(first.wait())
    finally:
        process.kill()
        await process.wait()
    await waiting
    assert first.now()
