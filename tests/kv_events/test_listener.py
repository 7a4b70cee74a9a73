"""The thread that listens, against publishers on real sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import zmq

from tests.support.processes import unused_ports
from tests.support.waiting import HUNG_S
from vllm_pd_scheduler.kv_events.chains import marks
from vllm_pd_scheduler.kv_events.listener import Listener, News, Prompt
from vllm_pd_scheduler.request.prompt import BLOCK_BYTES

SIZE = 16
IDS = list(range(1, 1025))
END = b"\xff" * 8


def stored(first: int = 0) -> dict[str, Any]:
    hashes = list(range(first, first + len(IDS) // SIZE))
    event = {"block_hashes": hashes, "parent_block_hash": None, "token_ids": IDS, "block_size": SIZE}
    return {"type": "BlockStored", **event}


class Heard:
    """All that the listener has told."""

    def __init__(self) -> None:
        self._told = threading.Condition()
        self.all = News()

    def __call__(self, news: News) -> None:
        with self._told:
            self.all.changes += news.changes
            self.all.links += news.links
            for ours, theirs in (
                (self.all.batches, news.batches),
                (self.all.lost, news.lost),
                (self.all.bad, news.bad),
            ):
                ours.update(theirs)
            self._told.notify_all()

    def until(self, condition: Callable[[News], object]) -> News:
        with self._told:
            assert self._told.wait_for(lambda: condition(self.all), HUNG_S), self.all
            return self.all


class Publisher:
    """Publishes batches by hand. Those in ``ring`` can be asked for again."""

    def __init__(self) -> None:
        self.live_port, self.replay_port = unused_ports(2)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._live = self._context.socket(zmq.XPUB)  # which says when somebody listens
        self._live.bind(f"tcp://127.0.0.1:{self.live_port}")
        self._replay = self._context.socket(zmq.ROUTER)
        self._replay.bind(f"tcp://127.0.0.1:{self.replay_port}")
        self.ring: dict[int, bytes] = {}

    @property
    def addresses(self) -> tuple[str, str]:
        return f"tcp://127.0.0.1:{self.live_port}", f"tcp://127.0.0.1:{self.replay_port}"

    def until_followed(self) -> None:
        assert self._live.poll(HUNG_S * 1000)
        self._live.recv()

    def publish(self, number: int, *events: Any, raw: bytes | None = None, lose: bool = False) -> None:
        data = msgspec.msgpack.encode([1.0, list(events), 0]) if raw is None else raw
        self.ring[number] = data
        if not lose:
            self._live.send_multipart([b"kv", number.to_bytes(8, "big"), data])

    def serve_replay(self) -> int:
        """Answer one question; return from which number on it was."""
        assert self._replay.poll(HUNG_S * 1000)
        client, *_, first = self._replay.recv_multipart()
        for number, data in self.ring.items():
            if number >= int.from_bytes(first, "big"):
                self._replay.send_multipart([client, b"", b"kv", number.to_bytes(8, "big"), data])
        self._replay.send_multipart([client, b"", b"kv", END, b""])
        return int.from_bytes(first, "big")

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    found = Publisher()
    yield found
    found.close()


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def listener(heard: Heard) -> Iterator[Listener]:
    found = Listener(heard)
    found.start()
    yield found
    found.stop()


NAMES = [name for _, name in sorted(marks(IDS, SIZE).items())]
CAME = ("p0", [(name, True) for name in NAMES])


def test_live(listener: Listener, heard: Heard, publisher: Publisher) -> None:
    listener.follow("p0", publisher.addresses[0], None)
    publisher.until_followed()
    publisher.publish(41, stored())
    publisher.publish(44, {"type": "AllBlocksCleared"})
    found = heard.until(lambda news: len(news.changes) == 2)
    assert found.changes == [CAME, ("p0", [None])]
    assert (found.batches["p0"], found.lost["p0"]) == (2, 2)


def test_what_was_before_and_what_was_lost(listener: Listener, heard: Heard, publisher: Publisher) -> None:
    publisher.publish(0, stored(), lose=True)
    listener.follow("p0", *publisher.addresses)
    publisher.until_followed()
    assert publisher.serve_replay() == 0
    assert heard.until(lambda news: news.changes).changes == [CAME]
    publisher.publish(1, {"type": "BlockRemoved", "block_hashes": [len(IDS) // SIZE - 1]}, lose=True)
    publisher.publish(2, {"type": "AllBlocksCleared"})
    assert publisher.serve_replay() == 1
    found = heard.until(lambda news: len(news.changes) == 3)
    assert found.changes[1:] == [("p0", [(NAMES[-1], False)]), ("p0", [None])]
    assert not found.lost


def test_a_replay_that_does_not_come_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, listener: Listener, heard: Heard, publisher: Publisher
) -> None:
    """Also if nothing more is heard of the publisher: what it has told since is taken in."""
    monkeypatch.setattr("vllm_pd_scheduler.kv_events.listener.REPLAY_S", 0.05)
    listener.follow("p0", *publisher.addresses)
    publisher.until_followed()
    publisher.publish(1, stored())
    assert heard.until(lambda news: news.changes).changes == [CAME]


def test_nonsense_is_counted_and_does_no_harm(listener: Listener, heard: Heard, publisher: Publisher) -> None:
    listener.follow("p0", publisher.addresses[0], None)
    publisher.until_followed()
    publisher.publish(0, raw=b"\xc1")
    publisher.publish(1, 7)
    publisher._live.send_multipart([b"kv", b"short", b""])
    publisher._live.send_multipart([b"kv"])
    publisher.publish(2, stored())
    found = heard.until(lambda news: news.changes)
    assert (found.changes, found.bad["p0"]) == ([CAME], 2)


def test_another_process_has_nothing_of_the_one_before(
    listener: Listener, heard: Heard, publisher: Publisher
) -> None:
    listener.follow("p0", publisher.addresses[0], None)
    publisher.until_followed()
    publisher.publish(5, stored())
    publisher.publish(0, stored(1000))
    assert heard.until(lambda news: len(news.changes) == 3).changes == [CAME, ("p0", [None]), CAME]


def test_links(listener: Listener, heard: Heard, publisher: Publisher) -> None:
    """A prompt is understood once somebody has told how long blocks are."""
    listener.follow("p0", publisher.addresses[0], None)
    publisher.until_followed()
    publisher.publish(0, stored())
    heard.until(lambda news: news.changes)
    prompt = Prompt((7, 8, 9, 10), 4 * BLOCK_BYTES, msgspec.json.encode(IDS))
    for ids in (b"[1, 2", b"[-1]", b"{}"):
        listener.learn(Prompt((1,), BLOCK_BYTES, ids))
    listener.learn(prompt)
    assert heard.until(lambda news: news.links).links == list(zip(NAMES, prompt.blocks, strict=True))


def test_it_can_be_left(listener: Listener, heard: Heard, publisher: Publisher) -> None:
    listener.follow("p0", publisher.addresses[0], None)
    publisher.until_followed()
    listener.leave("p0")
    assert publisher._live.poll(HUNG_S * 1000)  # it listens no more
    listener.leave("p0")
