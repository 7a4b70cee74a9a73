"""How replicas introduce themselves: who they are, and whether they are configured alike."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from ..config import SchedulerConfig
from ..config.replicas import OF_EACH
from ..replicas.message import SHOWN, Name

MAGIC = b"PDH"
"""A greeting begins with it, and no message of a replica."""
_MAX_BYTES = 64 << 10
_MAX_KNOWN = 256
_LISTED = 10
"""Keys that differ, which are said: a greeting may have any."""

_Text = Annotated[str, Meta(max_length=256, pattern=SHOWN)]
_Settings = Annotated[dict[_Text, int], Meta(max_length=1000)]


class Greeting(Struct, array_like=True, frozen=True):
    """What a replica says of itself."""

    replica: Name
    """As in its messages: new at each start."""
    name: _Text
    """As it is configured; empty if it is not."""
    machine: _Text
    version: _Text
    """Of the scheduler."""
    settings: _Settings
    """A hash of the value of each key that should be the same at all."""

    def shown(self) -> str:
        """Return who it is, for people."""
        return f"replica {self.name or self.replica} on {self.machine}"


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Greeting)


def settings_of(config: SchedulerConfig) -> dict[str, int]:
    """Return a hash of the value of each key that should be the same at all replicas."""
    values = config.model_dump(mode="json")
    return {key: hashed(value) for key, value in values.items() if key not in OF_EACH}


def hashed(value: object) -> int:
    """Return a hash of a value that JSON can have, below 2**32."""
    text = json.dumps(value, sort_keys=True)
    return int.from_bytes(blake2b(text.encode(), digest_size=4).digest())


class Greetings:
    """What the other replicas have said of themselves. It does no I/O."""

    def __init__(self, own: Greeting) -> None:
        self.own = own
        self._known: dict[str, Greeting] = {}

    @property
    def known(self) -> Mapping[str, Greeting]:
        """The others' newest greetings, by replica."""
        return self._known

    def encode(self) -> bytes:
        """Return our own greeting as it is sent."""
        return MAGIC + _encoder.encode(self.own)

    def receive(self, data: bytes) -> list[str] | None:
        """Take a greeting; return what is new in it for people, or ``None`` if it is none."""
        try:
            if len(data) > _MAX_BYTES:
                return None
            other = _decoder.decode(data[len(MAGIC) :])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        if other.replica == self.own.replica or other == self._known.get(other.replica):
            return []
        before = self._known.pop(other.replica, None)
        self._known[other.replica] = other
        if len(self._known) > _MAX_KNOWN:
            del self._known[next(iter(self._known))]
        return [each for each in self._lines(other) if before is None or each not in self._lines(before)]

    def forget(self, replicas: Iterable[str]) -> None:
        """Forget those that are not there any more."""
        for each in replicas:
            self._known.pop(each, None)

    def differing(self) -> list[str]:
        """Return the replicas that are configured in another way."""
        return [key for key, other in self._known.items() if self._differences(other)]

    def _lines(self, other: Greeting) -> list[str]:
        lines = []
        if self.own.name and other.name == self.own.name:
            lines.append(
                f"{other.shown()} has the same replicas.name as this one: reports on requests can reach the "
                "wrong one; give each replica a name of its own"
            )
        if other.version != self.own.version:
            lines.append(f"{other.shown()} runs version {other.version}, this one {self.own.version}")
        elif found := self._differences(other):
            keys = ", ".join(found[:_LISTED])
            keys += f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
            lines.append(
                f"{other.shown()} is configured in another way: {keys}; what it tells is used, "
                "but it chooses differently"
            )
        return lines

    def _differences(self, other: Greeting) -> list[str]:
        keys = sorted(self.own.settings.keys() | other.settings.keys())
        return [key for key in keys if self.own.settings.get(key) != other.settings.get(key)]
