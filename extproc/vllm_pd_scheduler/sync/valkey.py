"""A Valkey or Redis server as the place where replicas meet: messages by pub/sub, the log as a stream.

Nothing waits for it but who makes a change by the admin interface. A server that is away, stands still or was
emptied is tried again for ever; meanwhile messages are dropped.
"""

from __future__ import annotations

import asyncio
import random
import re
import ssl
from collections import deque
from typing import Any

from ..config import ReplicasConfig
from ..config.instances import is_host
from ..health.names import NameNotResolved, NameResolver
from ..models import canonical_host, is_ip, join_address
from .channel import (
    APPEND_S,
    MAX_CHANGE_BYTES,
    START,
    UNSURE,
    Change,
    Dropped,
    Listener,
    NotKept,
    Overtaken,
    Position,
    Traffic,
)
from .connection import Connection, Lost, Refused, connect

OLDEST = (6, 2)
"""The oldest version of Redis, in whose numbers Valkey goes on."""
CONNECT_S = 0.7
"""Seconds to connect, TLS included, before it is tried again."""
RETRY_S = (0.1, 0.3)
"""Seconds of pause before that, drawn at random so that replicas do not come all at once."""
LOOK_S = 1.0
"""Seconds between two looks at the log's end, for those of whose change no word has come."""
KEPT = 32
"""Changes that the log has at most. The newest has the whole state; those before it are for people."""
_HOPS = 5
"""Redirections that are followed, as while a Cluster moves its slots."""

_NEWEST = """
local trim = redis.pcall('XTRIM', KEYS[1], 'MAXLEN', ARGV[1])
if type(trim) == 'table' and trim.err and string.find(trim.err, 'READONLY') then
  return redis.error_reply('READONLY it can only be read')
end
local newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
return newest[1] and newest[1][1] or ''"""
"""Says where the log ends. Trimming, which does nothing, shows whether the server has become a copy."""
_APPEND = """
local newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
if (newest[1] and newest[1][1] or '') ~= ARGV[1] then return '' end
local id = redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[2], '*', 'change', ARGV[3])
redis.call(ARGV[4], KEYS[2], '')
return id"""
"""Appends if nobody else has, and says so to all by an empty message."""


class _Unusable(Exception):
    """There is no server to meet at; the message says why and what to do."""


class _Moved(Exception):
    """Another node of the Cluster has what we ask for."""

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(address)
        self.address = address


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
        self._changes = f"{{{fleet}}}:changes"
        self._publish = "PUBLISH"
        self._head = b""
        self._problem = f"no connection to {config.url} yet"
        self._connection: Connection | None = None
        """The one in use."""
        self._at = self._place.addresses[0]
        self._listener: Listener | None = None
        self._log = asyncio.Lock()
        """Whoever has it is the one who reads or writes the log."""
        self._known: Position = START
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
            async with asyncio.timeout(APPEND_S), self._log:
                return await self._append(data, expected)
        except TimeoutError:
            raise NotKept(f"the server has not answered for {APPEND_S:g} s{_UNSURE}") from None

    async def _append(self, data: bytes, expected: Position) -> Position:
        connection = self._connection
        if self._problem or connection is None:
            raise NotKept(self._problem)
        if expected != self._known:
            raise Overtaken
        words = ("EVAL", _APPEND, "2", self._changes, self._messages)
        try:
            answer = await connection.ask(*words, expected, str(KEPT), data, self._publish)
            if not answer:
                await self._look(connection)
                raise Overtaken
        except Refused as error:
            raise NotKept(f"the server says: {error}") from None
        except Lost as error:
            raise NotKept(f"{error}{_UNSURE}") from None
        self._tell(_text(answer), data)
        return self._known

    def _tell(self, position: Position, data: bytes) -> None:
        self._known = position
        if self._listener is not None:
            self._listener.changed(Change(position, data))

    async def _look(self, connection: Connection, first: bool = False) -> None:
        """Tell what is new in the log; raise :exc:`Refused` or :exc:`Lost`."""
        newest = _text(await connection.ask("EVAL", _NEWEST, "1", self._changes, str(KEPT)))
        if newest == START and (first or self._known != START):
            self._tell(START, b"")
        if newest == self._known:
            return
        entries = []
        if self._known != START or not first:
            begin = "-" if self._known == START else f"({self._known}"
            after = begin, "+", "COUNT", str(KEPT)
            entries = await connection.ask("XRANGE", self._changes, *after)
        if not entries:  # we come new, or the server has lost what we know
            entries = await connection.ask("XREVRANGE", self._changes, "+", "-", "COUNT", "1")
        for position, data in _changes(entries):
            self._tell(position, data)

    # -- the connection

    async def run(self, listener: Listener) -> None:
        """See :class:`~vllm_pd_scheduler.sync.channel.Channel`."""
        self._listener = listener
        try:
            while True:
                try:
                    connection = await self._meet()
                except _Unusable as error:
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
                async with self._log:
                    await self._look(connection)
                try:
                    async with asyncio.timeout(LOOK_S):
                        await self._news.wait()
                except TimeoutError:
                    pass  # no word has come
        except Refused as error:
            connection.close(_ONLY_READ if error.code == "READONLY" else f"it says: {error}")
        except Lost:
            pass  # it was told

    def _lost(self, problem: str) -> None:
        if problem != self._problem:
            self._problem = problem
            if self._listener is not None:
                self._listener.connection(problem)

    async def _meet(self) -> Connection:
        """Return a connection to a server that takes messages and changes; raise :exc:`_Unusable`."""
        problems = []
        for address in await self._addresses():
            try:
                return await self._connect(address)
            except _Unusable as error:
                problems.append(f"{join_address(*address)}: {error}")
        raise _Unusable("; ".join(problems))

    async def _addresses(self) -> tuple[tuple[str, int], ...]:
        """Return where servers should be, as the URL or the Sentinels say."""
        if self._config.sentinel is None:
            return self._place.addresses
        problems = []
        for address in self._place.addresses:
            try:
                return (await self._ask_sentinel(address, self._config.sentinel),)
            except _Unusable as error:
                problems.append(f"Sentinel {join_address(*address)}: {error}")
        raise _Unusable("; ".join(problems))

    async def _ask_sentinel(self, address: tuple[str, int], name: str) -> tuple[str, int]:
        connection = await self._open(address, _ignore, _ignore)
        try:
            if self._config.sentinel_password is not None:
                await connection.ask("AUTH", self._config.sentinel_password.read())
            found = await connection.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", name)
            if not found:
                raise _Unusable(f"it knows no server {name!r}: see replicas.sentinel")
            return _address(found)
        except (Refused, Lost, ValueError) as error:
            if isinstance(error, Refused) and "unknown command" in str(error):
                raise _Unusable(_NO_SENTINEL) from None
            raise _Unusable(_advice(error, "replicas.sentinel_password")) from None
        finally:
            connection.close()

    async def _connect(self, address: tuple[str, int]) -> Connection:
        for _ in range(_HOPS):
            connection = await self._open(address, self._pushed, self._connection_lost)
            try:
                await self._greet(connection)
                self._at = address
            except _Moved as moved:
                address = moved.address
                connection.close()
            except (_Unusable, Refused, Lost, ValueError) as error:
                connection.close(str(error))
                raise _Unusable(_advice(error)) from None
            else:
                return connection
        raise _Unusable("the nodes of the Cluster send from one to the next")

    async def _open(self, address: tuple[str, int], pushed: Any, lost: Any) -> Connection:
        host, port = address
        try:
            async with asyncio.timeout(CONNECT_S):
                ip = host if is_ip(host) else (await self._resolver.addresses(host))[0]
        except NameNotResolved as error:
            raise _Unusable(str(error)) from None
        except TimeoutError:
            raise _Unusable(f"no answer from DNS within {CONNECT_S:g} s") from None
        tls = None
        if self._tls is not None:
            tls = self._tls, self._config.tls_settings().server_name or host
        try:
            return await connect((ip, port), tls, pushed, lost, CONNECT_S)
        except Lost as error:
            raise _Unusable(str(error)) from None

    async def _greet(self, connection: Connection) -> None:
        """Log in, see that the server will do, and use it from now on."""
        who: tuple[str, ...] = ()
        source, user = self._config.password, self._place.user
        if source is not None or user:  # a user may be one without a password
            who = ("AUTH", user or "default", source.read() if source is not None else "")
        hello = await connection.ask("HELLO", "3", *who)
        sharded = _check(hello)
        if self._place.database:
            await connection.ask("SELECT", str(self._place.database))
        self._publish, subscribe = ("SPUBLISH", "SSUBSCRIBE") if sharded else ("PUBLISH", "SUBSCRIBE")
        word = self._publish.encode()
        words = len(word), word, len(self._messages), self._messages
        self._head = b"*3\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % words
        await _moving(connection.ask(subscribe, self._messages))
        async with self._log:
            await connection.ask(self._publish, self._messages, b"")
            await self._look(connection, first=True)
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


_NO_SENTINEL = "it is no Sentinel: leave replicas.sentinel out, or give the port of a Sentinel (26379)"
_ONLY_READ = "it is a copy that can only be read: name the primary in replicas.url, or use Sentinels"
_UNSURE = UNSURE % "the server is back"


async def _moving(answer: Any) -> None:
    try:
        await answer
    except Refused as error:
        if found := re.fullmatch(r"MOVED [0-9]+ (.+):([0-9]+)", str(error)):
            raise _Moved(_address([found[1], found[2]])) from None
        raise


def _check(hello: Any) -> bool:
    """Return whether messages go by shard; raise :exc:`_Unusable` if the server cannot be met at."""
    if not isinstance(hello, dict):
        raise _Unusable("what answers there is no Valkey or Redis server")
    about = {_text(key): value for key, value in hello.items()}
    version = _text(about.get("version", b""))
    numbers = tuple(int(each) for each in re.findall(r"[0-9]+", version)[:2])
    if numbers < OLDEST:
        raise _Unusable(f"it is version {version or 'unknown'}, too old: Redis 6.2 or Valkey 7.2 is needed")
    mode = _text(about.get("mode", b""))
    if mode == "sentinel":
        raise _Unusable("it is a Sentinel: give replicas.sentinel, the name by which it knows the server")
    if mode != "cluster" and _text(about.get("role", b"master")) != "master":
        raise _Unusable(_ONLY_READ)
    return mode == "cluster"


def _advice(error: Exception, see: str = "replicas.password and the user in replicas.url") -> str:
    """Return what is wrong, and what to do, for people."""
    text = str(error)
    if not isinstance(error, Refused):
        return text
    if error.code in ("NOAUTH", "WRONGPASS"):
        wrong = "it wants a password" if error.code == "NOAUTH" else "it does not take the user and password"
        return f"{wrong}: see {see}"
    if error.code == "NOPERM":
        return f"the user may not do what is needed (docs/replicas.md has the ACL rule): {text}"
    if error.code in ("NOPROTO",) or "unknown command" in text:
        return f"it is too old: Redis 6.2 or Valkey 7.2 is needed ({text})"
    return f"it says: {text}"


def _address(words: Any) -> tuple[str, int]:
    """Return the host and port that somebody tells; raise :exc:`ValueError` if they are none."""
    try:
        host, port = _text(words[0]), int(words[1])
    except (TypeError, ValueError, IndexError):
        host, port = "", 0
    if not is_host(canonical_host(host)) or not 0 < port < 65536:
        raise ValueError("it tells no address")
    return host, port


def _changes(entries: Any) -> list[tuple[str, bytes]]:
    """Return the entries of a log; raise :exc:`.Refused` if they are none."""
    try:
        found = []
        for position, fields in entries:
            values = dict(zip(fields[::2], fields[1::2], strict=False))
            data = values.get(b"change", b"")
            found.append((_text(position), data if isinstance(data, bytes) else b""))
    except (TypeError, ValueError):
        raise Refused("the log there is none of ours") from None
    return found


def _text(word: Any) -> str:
    return word.decode(errors="replace") if isinstance(word, bytes) else str(word)


def _ignore(_: object) -> None:
    """Take no note: a Sentinel pushes nothing, and is asked once."""
