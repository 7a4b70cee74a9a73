"""The workers' back end: messages to all others, and one log of changes, over the parent's socket."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.heard import Heard
from tests.support.waiting import until
from vllm_pd_scheduler.sync import local
from vllm_pd_scheduler.sync.channel import START, Change, Dropped, NotKept, Overtaken
from vllm_pd_scheduler.sync.frames import MAX_FRAME_BYTES, MAX_WAITING_BYTES, FrameReader, Told, encode
from vllm_pd_scheduler.sync.hub import Hub
from vllm_pd_scheduler.sync.local import LocalChannel, leave_together, tell_alive, tell_ready


class Worker(Heard):
    """A channel with what it was told."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.channel = LocalChannel(path)
        self.task = asyncio.ensure_future(self.channel.run(self))

    async def end(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


class Machine:
    """A hub, and the workers that are told of it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.ready: list[str] = []
        self.alive: list[str] = []
        self.drained: list[str] = []
        self.hub = Hub(self.ready.append, self.alive.append, self.drained.append)
        self.workers: list[Worker] = []

    async def worker(self) -> Worker:
        worker = Worker(self.path)
        self.workers.append(worker)
        await until(lambda: not worker.channel.problem)
        return worker


@pytest_asyncio.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    made = Machine(str(tmp_path / "hub"))
    await made.hub.start(made.path)
    yield made
    for each in made.workers:
        await each.end()
    await made.hub.stop()


async def test_what_one_says_all_others_hear_in_order(machine: Machine) -> None:
    one, two, three = [await machine.worker() for _ in range(3)]
    said = [bytes([number]) * number for number in range(50)]
    for each in said:
        assert one.channel.send(each)
    await until(lambda: len(two.messages) == len(three.messages) == len(said))
    assert two.messages == three.messages == said
    assert one.messages == []
    assert (one.channel.traffic.sent, two.channel.traffic.received) == (50, 50)
    assert two.channel.traffic.received_bytes == sum(map(len, said))


async def test_the_log_is_one_order_for_all(machine: Machine) -> None:
    one, two = await machine.worker(), await machine.worker()
    first = await one.channel.append(b"a", START)
    assert one.changes[-1] == Change(first, b"a"), "told before it returns"
    with pytest.raises(Overtaken):
        await two.channel.append(b"b", START)
    assert two.changes[-1] == Change(first, b"a"), "and so may try again after it"
    second = await two.channel.append(b"b", first)
    await until(lambda: len(one.changes) == 2)
    assert one.changes == two.changes == [Change(first, b"a"), Change(second, b"b")]
    late = await machine.worker()
    await until(lambda: bool(late.changes))
    assert late.changes == [Change(second, b"b")], "the newest has the whole state"


async def test_of_changes_at_once_one_is_first(machine: Machine) -> None:
    workers = [await machine.worker() for _ in range(4)]
    done = await asyncio.gather(
        *(each.channel.append(str(number).encode(), START) for number, each in enumerate(workers)),
        return_exceptions=True,
    )
    assert sum(isinstance(each, str) for each in done) == 1
    assert sum(isinstance(each, Overtaken) for each in done) == 3
    await until(lambda: all(len(each.changes) == 1 for each in workers))
    assert len({each.changes[0] for each in workers}) == 1


async def test_a_worker_that_is_cut_off_comes_back_and_hears_of_no_change_twice(machine: Machine) -> None:
    one, two = await machine.worker(), await machine.worker()
    await one.channel.append(b"a", START)
    await until(lambda: len(two.changes) == 1)
    for each in tuple(machine.hub._connections):
        each.close("a test")
    await until(lambda: two.channel.traffic.connected == 2 and one.channel.traffic.connected == 2)
    assert one.problems[-2:] == [one.problems[1], ""]
    assert "made again" in one.problems[1]
    assert one.channel.send(b"x")
    await until(lambda: two.messages == [b"x"])
    assert len(two.changes) == 1


async def test_one_that_does_not_read_is_cut_off_and_that_is_said_once(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    one = await machine.worker()
    (known,) = machine.hub._connections
    _, writer = await asyncio.open_unix_connection(machine.path)
    assert isinstance(writer.transport, asyncio.ReadTransport)
    writer.transport.pause_reading()
    await until(lambda: len(machine.hub._connections) == 2)
    (to_silent,) = (each.transport for each in machine.hub._connections - {known})
    assert to_silent is not None
    while (waiting := to_silent.get_write_buffer_size()) <= MAX_WAITING_BYTES:
        assert one.channel.send(bytes(1 << 20))
        await until(lambda waiting=waiting: to_silent.get_write_buffer_size() > waiting)
    for _ in range(20):  # they come at once
        assert one.channel.send(b"x")
    await until(lambda: len(machine.hub._connections) == 1)
    assert caplog.text.count("it does not read what it is sent") == 1
    writer.close()


_DEEP = b"\x93\1\xc4\0" + b"\x91" * 500_000


@pytest.mark.parametrize(
    "sent",
    [
        b"\xff" * 8,
        struct.pack("!I", MAX_FRAME_BYTES + 1),
        b"\0\0\0\1\5",
        struct.pack("!I", len(_DEEP)) + _DEEP,
    ],
    ids=["length", "too long", "no frame", "deep"],
)
async def test_garbage_ends_its_connection_alone(
    machine: Machine, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    one = await machine.worker()
    reader, writer = await asyncio.open_unix_connection(machine.path)
    writer.write(sent)
    with contextlib.suppress(ConnectionError):
        while await reader.read(1 << 16):
            pass
    writer.close()
    assert one.channel.send(b"x")
    assert not one.channel.problem
    assert "a worker's connection is closed: " in caplog.text
    assert "Traceback" not in caplog.text


async def test_without_a_hub_nothing_waits(tmp_path: Path) -> None:
    one = Worker(str(tmp_path / "hub"))
    await until(lambda: "cannot be reached" in one.channel.problem)
    assert not one.channel.send(b"x")
    assert one.channel.traffic.dropped[Dropped.AWAY] == 1
    with pytest.raises(NotKept, match="cannot be reached"):
        await one.channel.append(b"a", START)
    with pytest.raises(NotKept, match="at most"):
        await one.channel.append(bytes(2 << 20), START)
    await one.end()


async def test_a_change_that_was_sent_may_be_made_yet_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parent that stands still makes it when it goes on."""
    monkeypatch.setattr(local, "APPEND_S", 0.05)
    writers: list[asyncio.StreamWriter] = []
    path = str(tmp_path / "hub")
    server = await asyncio.start_unix_server(lambda _, writer: writers.append(writer), path)
    one = Worker(path)
    await until(lambda: writers and not one.channel.problem)
    with pytest.raises(NotKept, match=r"has not answered.*nobody knows whether"):
        await one.channel.append(b"a", START)
    monkeypatch.setattr(local, "APPEND_S", 5.0)
    asked = asyncio.ensure_future(one.channel.append(b"a", START))
    await asyncio.sleep(0.01)
    writers[0].transport.abort()
    with pytest.raises(NotKept, match=r"was lost.*nobody knows whether"):
        await asked
    await one.end()
    server.close()
    for each in writers:
        each.close()


async def test_the_hub_hears_who_serves(machine: Machine) -> None:
    await tell_ready(machine.path, "w1")
    await until(lambda: machine.ready == ["w1"])


async def test_the_hub_hears_signs_of_life_and_tells_them_to_nobody(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "ALIVE_S", 0.01)
    one, two = [await machine.worker() for _ in range(2)]
    telling = asyncio.ensure_future(tell_alive(machine.path, "w1"))
    try:
        await until(lambda: len(machine.alive) >= 3)
        for _ in range(20):  # who only tells reads nothing
            assert one.channel.send(bytes(1 << 20))
            await until(lambda: bool(two.messages))
            two.messages.clear()
        known = len(machine.alive)
        await until(lambda: len(machine.alive) > known)
    finally:
        telling.cancel()
    assert set(machine.alive) == {"w1"}


async def test_those_that_are_drained_leave_when_they_are_let_go(machine: Machine) -> None:
    one = await machine.worker()
    leaving = [asyncio.ensure_future(leave_together(machine.path, name)) for name in ("w0", "w1")]
    await until(lambda: sorted(machine.drained) == ["w0", "w1"])
    assert one.channel.send(b"they are told nothing")
    machine.hub.let_go()
    await asyncio.gather(*leaving)
    assert not one.channel.problem
    await machine.hub.stop()
    await leave_together(machine.path, "w0")  # without a parent it goes


def test_frames_come_in_any_pieces() -> None:
    reader = FrameReader()
    sent = encode(Told(b"abc")) + encode(Told(b""))
    found = [frame for at in range(len(sent)) for frame in reader.feed(sent[at : at + 1])]
    assert found == [Told(b"abc"), Told(b"")]
