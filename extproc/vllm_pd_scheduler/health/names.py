"""Look up DNS names, so that a resolver that is slow, broken or hangs holds up nothing else."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from ..models import canonical_ip

THREADS = 16
"""Look-ups under way at most: of a resolver that hangs, no more threads than these wait for it."""


class NameNotResolved(Exception):
    """A name has no address that can be used; ``args[0]`` says why, for people."""


def ask_system(host: str) -> list[str]:
    """Return all addresses of a name as the system knows them. Blocks; raises what ``getaddrinfo`` raises."""
    found = [info[4] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    # The address of a link is nothing without its zone, which is the last field and not in the text.
    return [f"{one[0]}%{one[3]}" if len(one) == 4 and one[3] else str(one[0]) for one in found]


class NameResolver:
    """Looks names up by ``ask`` in threads of its own: at most ``THREADS`` at once, and one for each name.

    The threads are daemons: one that hangs in the resolver keeps no process from ending.
    """

    def __init__(self, ask: Callable[[str], list[str]] = ask_system) -> None:
        self._ask = ask
        self._under_way: dict[str, asyncio.Future[list[str]]] = {}
        self._waiting: deque[str] = deque()
        self._threads = 0

    async def addresses(self, host: str) -> list[str]:
        """Return a name's addresses, canonical and in order; raises :exc:`NameNotResolved`.

        Whoever asks while a look-up of the same name is under way gets its result.
        """
        look_up = self._under_way.get(host)
        if look_up is None:
            look_up = self._under_way[host] = asyncio.get_running_loop().create_future()
            self._waiting.append(host)
            self._start()
        return await asyncio.shield(look_up)

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting and self._threads < THREADS:
            host = self._waiting.popleft()
            thread = threading.Thread(
                target=self._look_up, args=(loop, host), name="pd-resolver", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:  # this machine has no thread left
                self._finish(host, NameNotResolved(str(error)))
            else:
                self._threads += 1

    def _look_up(self, loop: asyncio.AbstractEventLoop, host: str) -> None:
        """Run in a thread."""
        result: list[str] | NameNotResolved
        try:
            usable = {canonical_ip(address) for address in self._ask(host)} - {None}
            result = sorted(filter(None, usable)) or NameNotResolved("it has no address that can be used")
        except socket.gaierror as error:
            result = NameNotResolved(error.strerror)
        except Exception as error:  # a name that cannot be encoded, or no memory: no address in any case
            result = NameNotResolved(str(error))
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(partial(self._done, host, result))

    def _done(self, host: str, result: list[str] | NameNotResolved) -> None:
        self._threads -= 1
        self._start()
        self._finish(host, result)

    def _finish(self, host: str, result: list[str] | NameNotResolved) -> None:
        future = self._under_way.pop(host)
        if isinstance(result, list):
            future.set_result(result)
        else:
            future.set_exception(result)
            future.exception()  # nobody may have waited
