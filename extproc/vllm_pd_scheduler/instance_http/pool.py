"""The connections to all instances, and requests on them."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from functools import partial

from .connection import Connection
from .errors import NotConnected
from .exchange import Answer, Destination, Exchange, post_head

CONNECT_TIMEOUT_S = 1.0
"""For TCP and TLS together, as in Envoy's clusters."""
_SLICES = 4
"""In which that is counted. One in which our own loop stood still counts as one, however long it was."""
IDLE_S = 4.0
"""uvicorn, and so vLLM (``VLLM_HTTP_TIMEOUT_KEEP_ALIVE``), closes a connection that has been idle for 5 s,
and a request must not meet that. Envoy's clusters have the same."""
MAX_IDLE = 256
"""Connections to one destination that are kept for later."""
_SWEEP_S = 1.0


class ConnectionPool:
    """Sends requests on connections that are kept open for a while.

    Addresses are ``ip:port``, with an IPv6 address in brackets. A name in place of the IP address is looked
    up in a thread for each new connection. ``tls`` says whom to trust, by default whom the system does.
    A connection is idle for ``idle_s`` seconds at most, unless the server says how long it keeps them.
    ``async with ConnectionPool() as pool`` ends all connections at the end of the block.
    """

    def __init__(self, tls: ssl.SSLContext | None = None, idle_s: float = IDLE_S) -> None:
        self.idle_s = idle_s
        self._tls = tls
        self._idle: dict[Destination, list[Connection]] = {}
        """Of each destination, the one that was used last at the end."""
        self._open: set[Connection] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self._sweeping: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> ConnectionPool:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def post(
        self,
        to: Destination,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        *,
        limit: int,
        timeout: float,
        name: bytes = b"",
        sent: Callable[[], object] | None = None,
    ) -> asyncio.Future[Answer]:
        """Send a POST; return its answer to come, whose body may have ``limit`` bytes.

        The future raises :exc:`~vllm_pd_scheduler.instance_http.errors.RequestFailed`, after ``timeout``
        seconds at the latest. To cancel it ends the request's connection. ``name`` is what the answer has
        near its beginning, if the instance repeats that: one that has the request before's is not taken.
        ``sent`` is called when a connection has taken the request.
        Raises :exc:`ValueError` for headers that cannot be sent.
        """
        exchange = Exchange(to, post_head(path, to[0], headers, len(body)), body, limit, timeout, name)
        exchange.sent = sent
        connection = self._take(to)
        if connection is not None:
            connection.start(exchange)
        else:
            self._connect(exchange)
        return exchange.answer

    async def close(self) -> None:
        """End all connections, with the requests that are on them."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        for task in self._connecting:
            task.cancel()
        await asyncio.gather(*self._connecting, return_exceptions=True)
        lost = [connection.lost for connection in self._open]
        for connection in tuple(self._open):
            connection.abort()
        await asyncio.gather(*lost)

    def free(self, connection: Connection) -> None:
        """Keep a connection for later; see :class:`~vllm_pd_scheduler.instance_http.connection.Owner`."""
        idle = self._idle.setdefault(connection.to, [])
        idle.append(connection)
        if len(idle) > MAX_IDLE:
            idle.pop(0).abort()
        if self._sweeping is None:
            self._sweep_later()

    def gone(self, connection: Connection) -> None:
        """Forget a connection."""
        self._open.discard(connection)
        idle = self._idle.get(connection.to)
        if idle is not None and connection in idle:
            idle.remove(connection)

    def repeat(self, exchange: Exchange) -> None:
        """Send a request on a new connection, since it has not arrived on an old one."""
        exchange.repeated = True
        if not exchange.answer.done():
            self._connect(exchange)

    def _take(self, to: Destination) -> Connection | None:
        idle = self._idle.get(to)
        if not idle:
            return None
        now = time.monotonic()
        while idle:
            connection = idle.pop()
            if connection.usable(now):
                return connection
            connection.abort()
        return None

    def _sweep_later(self) -> None:
        self._sweeping = asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        """End what has been idle for too long."""
        self._sweeping = None
        now = time.monotonic()
        for to, idle in tuple(self._idle.items()):
            usable = [connection for connection in idle if connection.usable(now)]
            ended = [connection for connection in idle if not connection.usable(now)]
            if usable:
                idle[:] = usable
            else:
                del self._idle[to]
            for connection in ended:
                connection.abort()
        if self._idle:
            self._sweep_later()

    def _connect(self, exchange: Exchange) -> None:
        task = asyncio.get_running_loop().create_task(self._start_on_new(exchange))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)
        exchange.stop = task.cancel

    async def _start_on_new(self, exchange: Exchange) -> None:
        try:
            connection = await self._new(exchange.to)
        except asyncio.CancelledError:
            exchange.fail(NotConnected("the pool was closed"))  # if nobody has cancelled the answer itself
            raise
        except Exception as error:  # whatever it is, somebody waits
            exchange.fail(NotConnected(str(error) or type(error).__name__, error))
        else:
            if exchange.answer.done():
                connection.abort()
            else:
                connection.start(exchange)

    async def _new(self, to: Destination) -> Connection:
        """Return a new connection; raises :exc:`OSError`, which :exc:`TimeoutError` is, and what TLS says."""
        address, name = to
        host, _, port = address.rpartition(":")
        if name is not None and self._tls is None:
            self._tls = ssl.create_default_context()
        loop = asyncio.get_running_loop()
        connecting = asyncio.ensure_future(
            loop.create_connection(
                partial(Connection, self, to),
                host.strip("[]"),
                int(port),
                ssl=None if name is None else self._tls,
                server_hostname=name,
            )
        )
        try:
            for _ in range(_SLICES):
                await asyncio.wait({connecting}, timeout=CONNECT_TIMEOUT_S / _SLICES)
                if connecting.done():
                    break
            else:
                raise TimeoutError(f"no connection within {CONNECT_TIMEOUT_S:g} s")
        except BaseException:
            await _discard(connecting)
            raise
        _, connection = connecting.result()
        if not connection.lost.done():
            self._open.add(connection)
        return connection


async def _discard(connecting: asyncio.Future[tuple[asyncio.Transport, Connection]]) -> None:
    """Give up a connection that may just have been made."""
    connecting.cancel()
    await asyncio.wait({connecting})
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result()[1].abort()
