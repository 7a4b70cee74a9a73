"""A Valkey or Redis server as the place where replicas meet: messages by pub/sub, the log as a stream.

Nothing waits for it but who makes a change by the admin interface. A server that is away, stands still or was
emptied is tried again for ever; meanwhile messages are dropped.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections import deque
from typing import Any

from ..config import ReplicasConfig
from ..health.names import NameNotResolved, NameResolver
from ..models import is_ip, join_address
from .channel import (
    APPEND_S,
    MAX_CHANGE_BYTES,
    UNSURE,
    Change,
    Dropped,
    Listener,
    NotKept,
    Position,
    Traffic,
)
from .connection import Connection, Lost, Refused, connect
from .valkey_log import ValkeyLog
from .valkey_server import (
    NO_SENTINEL,
    Moved,
    Unusable,
    address_of,
    advice,
    check_hello,
    moving,
)

CONNECT_S = 0.7
"""Seconds to connect, TLS included, before it is tried again."""
RETRY_S = (0.1, 0.3)
"""Seconds of pause before that, drawn at random so that replicas do not come all at once."""
LOOK_S = 1.0
"""Seconds between two looks at the log's end, for those of whose change no word has come."""
_HOPS = 5
"""Redirections that are followed, as while a Cluster moves its slots."""
_UNSURE = UNSURE % "the server is back"


class Valkey:
    """A :class:`~vllm_pd_scheduler.sync.channel.Channel` by such a server.

    ``tls`` is the context of connections to it, if the URL wants TLS.
    """

    def __init__(
        self, config: ReplicasConfig, tls: ssl.SSLContext | None = None, resolver: NameResolver | None = None
    ) -> None:
        self.traffic = Traffic()
        self._config = config
        self._place = config.meeting()
        self._tls = tls
        self._resolver = resolver or NameResolver()
        fleet = self._place.fleet(config.key)
        self._messages = f"{{{fleet}}}:messages".encode()
        self._publish = "PUBLISH"
        self._head = b""
        self._problem = f"no connection to {config.url} yet"
        self._connection: Connection | None = None
        """The one in use."""
        self._at = self._place.addresses[0]
        self._listener: Listener | None = None
        self._log = ValkeyLog(f"{{{fleet}}}:changes", self._messages, self._changed)
        self._one_at_a_time = asyncio.Lock()
        """Whoever has it is the one who reads or writes the log."""
        self._news = asyncio.Event()
        """There may be something new in the log."""
        self._ours: deque[bytes] = deque(maxlen=256)
        """Messages of our own that have not come back yet."""

    @property
    def problem(self) -> str:
        """See :class:`~vllm_pd_scheduler.sync.channel.Channel`."""
        return self._problem

    # -- messages

    def send(self, data: bytes) -> bool:
        """See :class:`~vllm_pd_scheduler.sync.channel.Channel`."""
        traffic = self.traffic
        if self._problem or self._connection is None:
            traffic.dropped[Dropped.AWAY] += 1
            return False
        if not self._connection.tell(b"%b$%d\r\n%b\r\n" % (self._head, len(data), data)):
            traffic.dropped[Dropped.SLOW] += 1
            return False
        self._ours.append(data)
        traffic.sent += 1
        traffic.sent_bytes += len(data)
        return True

    def _pushed(self, words: list[Any]) -> None:
        """Take what the server sends by itself."""
        kind = words[0] if words else b""
        if kind not in (b"message", b"smessage") or len(words) != 3 or not isinstance(words[2], bytes):
            if self._connection is not None and kind in (b"unsubscribe", b"sunsubscribe"):
                self._connection.close("the Cluster has moved what replicas meet at")
            return
        data: bytes = words[2]
        if not data:
            self._news.set()
        elif data in self._ours:
            while self._ours.popleft() != data:
                pass
        elif self._listener is not None:
            self.traffic.received += 1
            self.traffic.received_bytes += len(data)
            self._listener.received(data)

    # -- the log

    async def append(self, data: bytes, expected: Position) -> Position:
        """See :class:`~vllm_pd_scheduler.sync.channel.Channel`."""
        if len(data) > MAX_CHANGE_BYTES:
            raise NotKept(f"it is longer than {MAX_CHANGE_BYTES} bytes")
        try:
            async with asyncio.timeout(APPEND_S), self._one_at_a_time:
                return await self._append(data, expected)
        except TimeoutError:
            raise NotKept(f"the server has not answered for {APPEND_S:g} s{_UNSURE}") from None

    async def _append(self, data: bytes, expected: Position) -> Position:
        connection = self._connection
        if self._problem or connection is None:
            raise NotKept(self._problem)
        try:
            return await self._log.append(connection, data, expected, self._publish)
        except Refused as error:
            raise NotKept(f"the server says: {error}") from None
        except Lost as error:
            raise NotKept(f"{error}{_UNSURE}") from None

    def _changed(self, change: Change) -> None:
        if self._listener is not None:
            self._listener.changed(change)

    # -- the connection

    async def run(self, listener: Listener) -> None:
        """See :class:`~vllm_pd_scheduler.sync.channel.Channel`."""
        self._listener = listener
        try:
            while True:
                try:
                    connection = await self._meet()
                except Unusable as error:
                    self._lost(str(error))
                else:
                    await self._follow(connection)
                await asyncio.sleep(random.uniform(*RETRY_S))
        finally:
            self._listener = None
            if self._connection is not None:
                self._connection.close()

    async def _follow(self, connection: Connection) -> None:
        """Follow the log until the connection is lost."""
        try:
            while True:
                self._news.clear()
                async with self._one_at_a_time:
                    await self._log.look(connection)
                try:
                    async with asyncio.timeout(LOOK_S):
                        await self._news.wait()
                except TimeoutError:
                    pass  # no word has come
        except Refused as error:
            connection.close(advice(error))
        except Lost:
            pass  # it was told

    def _lost(self, problem: str) -> None:
        if problem != self._problem:
            self._problem = problem
            if self._listener is not None:
                self._listener.connection(problem)

    async def _meet(self) -> Connection:
        """Return a connection to a server that takes messages and changes; raise :exc:`Unusable`."""
        problems = []
        for address in await self._addresses():
            try:
                return await self._connect(address)
            except Unusable as error:
                problems.append(f"{join_address(*address)}: {error}")
        raise Unusable("; ".join(problems))

    async def _addresses(self) -> tuple[tuple[str, int], ...]:
        """Return where servers should be, as the URL or the Sentinels say."""
        if self._config.sentinel is None:
            return self._place.addresses
        problems = []
        for address in self._place.addresses:
            try:
                return (await self._ask_sentinel(address, self._config.sentinel),)
            except Unusable as error:
                problems.append(f"Sentinel {join_address(*address)}: {error}")
        raise Unusable("; ".join(problems))

    async def _ask_sentinel(self, address: tuple[str, int], name: str) -> tuple[str, int]:
        connection = await self._open(address, _ignore, _ignore)
        try:
            if self._config.sentinel_password is not None:
                await connection.ask("AUTH", self._config.sentinel_password.read())
            found = await connection.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", name)
            if not found:
                raise Unusable(f"it knows no server {name!r}: see replicas.sentinel")
            return address_of(found)
        except (Refused, Lost, ValueError) as error:
            if isinstance(error, Refused) and "unknown command" in str(error):
                raise Unusable(NO_SENTINEL) from None
            raise Unusable(advice(error, "replicas.sentinel_password")) from None
        finally:
            connection.close()

    async def _connect(self, address: tuple[str, int]) -> Connection:
        for _ in range(_HOPS):
            connection = await self._open(address, self._pushed, self._connection_lost)
            try:
                await self._greet(connection)
                self._at = address
            except Moved as moved:
                address = moved.address
                connection.close()
            except (Unusable, Refused, Lost, ValueError) as error:
                connection.close(str(error))
                raise Unusable(advice(error)) from None
            else:
                return connection
        raise Unusable("the nodes of the Cluster send from one to the next")

    async def _open(self, address: tuple[str, int], pushed: Any, lost: Any) -> Connection:
        host, port = address
        try:
            async with asyncio.timeout(CONNECT_S):
                ip = host if is_ip(host) else (await self._resolver.addresses(host))[0]
        except NameNotResolved as error:
            raise Unusable(str(error)) from None
        except TimeoutError:
            raise Unusable(f"no answer from DNS within {CONNECT_S:g} s") from None
        tls = None
        if self._tls is not None:
            tls = self._tls, self._config.tls_settings().server_name or host
        try:
            return await connect((ip, port), tls, pushed, lost, CONNECT_S)
        except Lost as error:
            raise Unusable(str(error)) from None

    async def _greet(self, connection: Connection) -> None:
        """Log in, see that the server will do, and use it from now on."""
        who: tuple[str, ...] = ()
        source, user = self._config.password, self._place.user
        if source is not None or user:  # a user may be one without a password
            who = ("AUTH", user or "default", source.read() if source is not None else "")
        hello = await connection.ask("HELLO", "3", *who)
        sharded = check_hello(hello)
        if self._place.database:
            await connection.ask("SELECT", str(self._place.database))
        self._publish, subscribe = ("SPUBLISH", "SSUBSCRIBE") if sharded else ("PUBLISH", "SUBSCRIBE")
        word = self._publish.encode()
        words = len(word), word, len(self._messages), self._messages
        self._head = b"*3\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % words
        await moving(connection.ask(subscribe, self._messages))
        async with self._one_at_a_time:
            await connection.ask(self._publish, self._messages, b"")
            await self._log.look(connection, first=True)
            self._ours.clear()
            self._connection, self._problem = connection, ""
            self.traffic.connected += 1
            if self._listener is not None:
                self._listener.connection("")

    def _connection_lost(self, problem: str) -> None:
        # Of one that was not in use yet, `_meet` tells more.
        if self._connection is not None and self._connection.problem:
            self._connection = None
            self._news.set()
            self._lost(f"{join_address(*self._at)}: {problem}")


def _ignore(_: object) -> None:
    """Take no note: a Sentinel pushes nothing, and is asked once."""
