"""Listens to engines' KV events in a thread of its own: the event loop gets what is left to know."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

import msgspec
import zmq

from .cached import Change, links
from .chains import EngineBlocks, marks
from .in_order import InOrder
from .message import MAX_BYTES, BadBatch, read_batch

log = logging.getLogger(__name__)

POLL_MS = 20
"""How long to wait for events before what else there is to do is looked at."""
REPLAY_S = 5.0
"""How long a replay may take."""
MAX_TOKENS = 1 << 20
"""Of a prompt that is learned from."""
_END = (1 << 64) - 1
"""-1 as the eight bytes of a number: the end of a replay."""

_Batch = tuple[bool, bytes | None]
"""A batch, and whether the publisher is another process from it on."""

_read_ids = msgspec.json.Decoder(list[int]).decode


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of which P has told the tokens: ``token_ids`` is a JSON array."""

    blocks: Sequence[int]
    size: int
    """Bytes."""
    token_ids: bytes


@dataclass(slots=True)
class News:
    """What is new for the event loop."""

    changes: list[tuple[str, list[Change]]] = field(default_factory=list)
    """By the names of publishers, in their order."""
    links: list[tuple[int, int]] = field(default_factory=list)
    batches: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)


class Listener:
    """A thread that listens to publishers. ``post`` is called in it, with what is new."""

    def __init__(self, post: Callable[[News], None], topic: str = "") -> None:
        self._post = post
        self._topic = topic
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._publishers: dict[str, _Publisher] = {}
        self._news = News()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and all connections; takes at most the time of one look."""
        self._jobs.put(None)
        self._thread.join()

    def follow(self, name: str, address: str, replay: str | None) -> None:
        """Listen to a publisher; one that has the name already is left."""

        def job() -> None:
            self._leave(name)
            self._publishers[name] = _Publisher(self._context, address, replay, self._topic)

        self._jobs.put(job)

    def leave(self, name: str) -> None:
        """Listen to a publisher no more."""
        self._jobs.put(lambda: self._leave(name))

    def learn(self, prompt: Prompt) -> None:
        """Link a prompt's blocks to the names that engines have for them."""
        self._jobs.put(lambda: self._learn(prompt))

    # -- in the thread

    def _run(self) -> None:
        try:
            while self._work():
                self._hear()
                news, self._news = self._news, News()
                if any((news.changes, news.links, news.batches, news.lost, news.bad)):
                    self._post(news)
        finally:
            for name in list(self._publishers):
                self._leave(name)
            self._context.term()

    def _work(self) -> bool:
        """Do what is asked for; return whether to go on."""
        for _ in range(self._jobs.qsize()):
            job = self._jobs.get()
            if job is None:
                return False
            job()
        return True

    def _hear(self) -> None:
        poller, waiting = zmq.Poller(), {}
        for name, publisher in self._publishers.items():
            self._take(name, publisher, publisher.look_at_replay())
            for socket in publisher.sockets:
                poller.register(socket, zmq.POLLIN)
                waiting[socket] = name
        if not waiting:
            time.sleep(POLL_MS / 1e3)
            return
        for socket, _ in poller.poll(POLL_MS):
            name = waiting[socket]
            publisher = self._publishers[name]
            self._take(name, publisher, publisher.read(socket))

    def _take(self, name: str, publisher: _Publisher, batches: list[_Batch]) -> None:
        """Take in the batches of a publisher that are next."""
        for restarted, batch in batches:
            if restarted:
                publisher.blocks.clear()
                self._news.changes.append((name, [None]))
            if batch is None:
                continue
            self._news.batches[name] += 1
            try:
                changes = publisher.blocks.apply(read_batch(batch))
            except BadBatch as error:
                self._news.bad[name] += 1
                publisher.complain(name, str(error))
                continue
            if changes:
                self._news.changes.append((name, changes))
        if lost := publisher.newly_lost():
            self._news.lost[name] += lost

    def _leave(self, name: str) -> None:
        if (publisher := self._publishers.pop(name, None)) is not None:
            publisher.close()

    def _learn(self, prompt: Prompt) -> None:
        try:
            ids = _read_ids(prompt.token_ids)
            sizes = {each.blocks.block_size for each in self._publishers.values()} - {0}
            if not prompt.size or len(ids) > MAX_TOKENS:
                return
            for size in sizes:
                self._news.links += links(prompt.blocks, prompt.size, len(ids), marks(ids, size))
        except (msgspec.MsgspecError, OverflowError):
            return  # P's own affair: D got them too


class _Publisher:
    """One publisher: its sockets, the order of its batches, and what its engine has cached."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], address: str, replay: str | None, topic: str
    ) -> None:
        self.order = InOrder(can_replay=replay is not None)
        self.blocks = EngineBlocks()
        self._live = _connected(context, zmq.SUB, address)
        self._live.setsockopt_string(zmq.SUBSCRIBE, topic)
        self._replay = None if replay is None else _connected(context, zmq.DEALER, replay)
        self._asked_at: float | None = None
        self._lost = 0
        self._said = False
        self.order.began()

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        return [each for each in (self._live, self._replay) if each is not None]

    def look_at_replay(self) -> list[_Batch]:
        """Ask for what was lost, once; return what waits for a replay that has not come in time."""
        if self._replay is None:
            return []
        if self._asked_at is None and self.order.asks_from is not None:
            self._replay.send_multipart([b"", self.order.asks_from.to_bytes(8, "big")])
            self._asked_at = time.monotonic()
            self.order.asks_from = None
        if self._asked_at is None or time.monotonic() - self._asked_at <= REPLAY_S:
            return []
        self._asked_at = None
        return [(False, batch) for batch in self.order.given_up()]

    def read(self, socket: zmq.Socket[bytes]) -> list[_Batch]:
        """Return the batches that are next."""
        frames = socket.recv_multipart()
        found: list[bytes] = []
        restarted = False
        if len(frames) < 2 or len(frames[-2]) != 8:
            return []
        number = int.from_bytes(frames[-2], "big")
        if socket is self._replay:
            found = self.order.replayed(-1 if number == _END else number, frames[-1])
            if number == _END:
                self._asked_at = None
        else:
            restarted, found = self.order.live(number, frames[-1])
        begun: list[_Batch] = [(True, None)] if restarted else []
        return begun + [(False, batch) for batch in found]

    def newly_lost(self) -> int:
        """Return how many batches were lost since this was asked last."""
        lost = self.order.lost - self._lost
        self._lost = self.order.lost
        return lost

    def complain(self, name: str, problem: str) -> None:
        """Say once that a publisher sends what cannot be read."""
        if not self._said:
            self._said = True
            log.warning("KV events of %s cannot be read: %s (said once)", name, problem)

    def close(self) -> None:
        """End the connections."""
        for socket in self.sockets:
            socket.close(linger=0)


def _connected(context: zmq.Context[zmq.Socket[bytes]], kind: int, address: str) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = context.socket(kind)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
    socket.setsockopt(zmq.IPV6, 1)
    socket.connect(address)
    return socket
