"""What a Valkey or Redis server says of itself: whether replicas can meet there, and if not, what to do."""

from __future__ import annotations

import re
from collections.abc import Awaitable
from typing import Any

from ..config.instances import is_host
from ..models import canonical_host
from .connection import Refused

OLDEST = (6, 2)
"""The oldest version of Redis, in whose numbers Valkey goes on."""
NO_SENTINEL = "it is no Sentinel: leave replicas.sentinel out, or give the port of a Sentinel (26379)"
ONLY_READ = "it is a copy that can only be read: name the primary in replicas.url, or use Sentinels"

FOREIGN_LOG = (
    "the log there is none of ours: delete the key {KEY}:changes, where KEY is replicas.key, or choose "
    "another replicas.key"
)


class Unusable(Exception):
    """There is no server to meet at; the message says why and what to do."""


class Moved(Exception):
    """Another node of the Cluster has what we ask for."""

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(address)
        self.address = address


async def moving(answer: Awaitable[object]) -> None:
    """Wait for an answer; raise :exc:`Moved` if another node has it."""
    try:
        await answer
    except Refused as error:
        if found := re.fullmatch(r"MOVED [0-9]+ (.+):([0-9]+)", str(error)):
            raise Moved(address_of([found[1], found[2]])) from None
        raise


def check_hello(hello: Any) -> bool:
    """Return whether messages go by shard; raise :exc:`Unusable` if the server cannot be met at."""
    if not isinstance(hello, dict):
        raise Unusable("what answers there is no Valkey or Redis server")
    about = {text_of(key): value for key, value in hello.items()}
    version = text_of(about.get("version", b""))
    numbers = tuple(int(each) for each in re.findall(r"[0-9]+", version)[:2])
    if numbers < OLDEST:
        raise Unusable(f"it is version {version or 'unknown'}, too old: Redis 6.2 or Valkey 7.2 is needed")
    mode = text_of(about.get("mode", b""))
    if mode == "sentinel":
        raise Unusable("it is a Sentinel: give replicas.sentinel, the name by which it knows the server")
    if mode != "cluster" and text_of(about.get("role", b"master")) != "master":
        raise Unusable(ONLY_READ)
    return mode == "cluster"


def advice(error: Exception, see: str = "replicas.password and the user in replicas.url") -> str:
    """Return what is wrong, and what to do, for people."""
    text = str(error)
    if not isinstance(error, Refused):
        return text
    if error.code in ("NOAUTH", "WRONGPASS"):
        wrong = "it wants a password" if error.code == "NOAUTH" else "it does not take the user and password"
        return f"{wrong}: see {see}"
    if error.code == "READONLY":
        return ONLY_READ
    if error.code == "WRONGTYPE":
        return FOREIGN_LOG
    if error.code == "NOPERM":
        return f"the user may not do what is needed (docs/replicas.md has the ACL rule): {text}"
    if error.code in ("NOPROTO",) or "unknown command" in text:
        return f"it is too old: Redis 6.2 or Valkey 7.2 is needed ({text})"
    return f"it says: {text}"


def address_of(words: Any) -> tuple[str, int]:
    """Return the host and port that somebody tells; raise :exc:`ValueError` if they are none."""
    try:
        host, port = text_of(words[0]), int(words[1])
    except (TypeError, ValueError, IndexError):
        host, port = "", 0
    if not is_host(canonical_host(host)) or not 0 < port < 65536:
        raise ValueError("it tells no address")
    return host, port


def text_of(word: Any) -> str:
    """Return a word of the server's as text."""
    return word.decode(errors="replace") if isinstance(word, bytes) else str(word)
