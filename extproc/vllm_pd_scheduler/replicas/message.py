"""What replicas tell each other, and how that is written.

A message is ``PDR``, the format's version (one byte), the fleet's key (8 bytes) and a MessagePack array.
Loads are told as sums that stand for themselves, not as differences: one that is lost is mended by the next,
one that comes twice changes nothing. Endpoints are indices of a list of ids in the same message. There is no
time of day in it, since clocks differ, and nothing of a prompt but hashes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import StrEnum
from hashlib import blake2b
from itertools import chain
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

VERSION = 1
MAX_BYTES = 1 << 20
"""Of a message. What is longer is not read."""
MAX_ITEMS = 10_000
"""In each list of a message."""
MAX_BLOCKS = 4096
"""Of one prompt whose placement is told: the beginning of a longer one."""
MAX_REQUESTS = 10_000
"""Requests of one replica on one endpoint: what it claims beyond that is not believed."""
MAX_TOKENS = 1_000_000_000
"""Tokens of those."""
MAX_PROMPT = 100_000_000
"""Tokens of one prompt."""
MAX_FOUND_BYTES = 1 << 15
"""Of what was found at one instance: 64 ranks have some 14 KB."""
MAX_COEFFICIENT = 100.0
"""Seconds: the fixed cost of a prefill or a step, or what a token adds, is surely less."""

_MAGIC = b"PDR"
_HEADER = len(_MAGIC) + 1 + 8

Index = Annotated[int, Meta(ge=0, lt=MAX_ITEMS)]
Number = Annotated[int, Meta(ge=0, lt=1 << 62)]
Prompt = Annotated[int, Meta(ge=0, le=MAX_PROMPT)]
Blocks = Annotated[bytes, Meta(max_length=8 * MAX_BLOCKS)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Coefficients = tuple[
    Annotated[float, Meta(ge=0.0, le=MAX_COEFFICIENT)],
    Annotated[float, Meta(ge=0.0, le=MAX_COEFFICIENT)],
    Annotated[float, Meta(ge=0.0, le=MAX_COEFFICIENT)],
]


class Ignored(StrEnum):
    """Why a message was not used."""

    GARBAGE = "garbage"
    """No message, or one with numbers that cannot be."""
    TOO_LONG = "too long"
    VERSION = "another version"
    FLEET = "another fleet"
    REPLAYED = "replayed or late"
    FUTURE = "from the future"
    TOO_MANY = "too many replicas"
    FINDING = "a finding that cannot be"
    """Of a message that was used: what it tells of an instance was not."""


class Unreadable(ValueError):
    """Bytes that are no message for us; ``reason`` says why."""

    def __init__(self, reason: Ignored) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Share(Struct, array_like=True, frozen=True):
    """What one replica has on one endpoint, all told."""

    endpoint: Index
    requests: Number
    tokens: Number
    on_trial: bool = False
    """Whether one of its requests is the endpoint's trial."""
    ejections: Annotated[int, Meta(ge=0, lt=1 << 16)] = 0
    """How often its requests had the endpoint ejected, modulo 65,536."""
    recoveries: Annotated[int, Meta(ge=0, lt=1 << 16)] = 0
    """How often a trial request of its own went well, likewise."""


class Prefill(Struct, array_like=True, frozen=True):
    """A prefill that was sent to a P."""

    number: Number
    """Names it, of this replica's."""
    endpoint: Index
    prompt: Prompt
    cached: Prompt = 0
    """Tokens that were taken for cached there, and the leading blocks of these."""
    cached_blocks: Annotated[int, Meta(ge=0, le=MAX_PROMPT)] = 0
    blocks: Blocks = b""
    """Of its prompt: hashes of 8 bytes each. A summary has none."""


class Ended(Struct, array_like=True, frozen=True):
    """A prefill that is queued no more; with ``prompt`` it was done, and can be learned from."""

    number: Number
    prompt: Prompt = 0
    cached: Annotated[int, Meta(ge=-1, le=MAX_PROMPT)] = -1
    """Tokens of the prompt that P had cached; -1 if it does not say."""


class Placement(Struct, array_like=True, frozen=True):
    """A prompt that is cached on an endpoint from now on, other than by a :class:`Prefill`."""

    endpoint: Index
    blocks: Blocks


class Learned(Struct, array_like=True, frozen=True):
    """Coefficients of the load model, for a replica that has learned nothing yet."""

    prefill: Coefficients
    decode: Coefficients


class Found(Struct, array_like=True, frozen=True):
    """What a probe of an instance has found, as :mod:`vllm_pd_scheduler.health.finding` writes it."""

    endpoint: Index
    told: Annotated[bytes, Meta(max_length=MAX_FOUND_BYTES)]


class Message(Struct, array_like=True, frozen=True):
    """What a replica did since its message before; with ``summary`` all that it has, and nothing else."""

    replica: Name
    number: Annotated[int, Meta(ge=1, lt=1 << 62)]
    """One more for each message of a replica."""
    summary: bool
    waiting: tuple[Number, Number]
    """Requests in its queue, for P and for D."""
    endpoints: Annotated[list[Name], Meta(max_length=MAX_ITEMS)]
    shares: Annotated[list[Share], Meta(max_length=MAX_ITEMS)] = []
    prefills: Annotated[list[Prefill], Meta(max_length=MAX_ITEMS)] = []
    ended: Annotated[list[Ended], Meta(max_length=MAX_ITEMS)] = []
    placed: Annotated[list[Placement], Meta(max_length=MAX_ITEMS)] = []
    learned: Learned | None = None
    probing: Annotated[list[Index], Meta(max_length=MAX_ITEMS)] = []
    """Instances that it asks just now how they are, for all replicas; each by an endpoint."""
    found: Annotated[list[Found], Meta(max_length=MAX_ITEMS)] = []


class FleetKey:
    """Keeps the messages of fleets apart, and writes and reads those of one."""

    def __init__(self, fleet: str) -> None:
        self._header = _MAGIC + bytes([VERSION]) + blake2b(fleet.encode(), digest_size=8).digest()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Message)

    def encode(self, message: Message) -> bytes:
        """Return a message as it is sent."""
        return self._header + self._encoder.encode(message)

    def decode(self, data: bytes) -> Message:
        """Return the message that was sent; raise :exc:`Unreadable` if there is none for this fleet."""
        if len(data) > MAX_BYTES:
            raise Unreadable(Ignored.TOO_LONG)
        header = data[:_HEADER]
        if len(header) < _HEADER or not header.startswith(_MAGIC):
            raise Unreadable(Ignored.GARBAGE)
        if header[: len(_MAGIC) + 1] != self._header[: len(_MAGIC) + 1]:
            raise Unreadable(Ignored.VERSION)
        if header != self._header:
            raise Unreadable(Ignored.FLEET)
        try:
            message = self._decoder.decode(data[_HEADER:])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise Unreadable(Ignored.GARBAGE) from None
        parts = (message.shares, message.prefills, message.placed, message.found)
        used = (each.endpoint for part in parts for each in part)
        if max(chain(used, message.probing), default=-1) >= len(message.endpoints) or not _whole(message):
            raise Unreadable(Ignored.GARBAGE)
        return message


def _whole(message: Message) -> bool:
    hashes = (each.blocks for part in (message.prefills, message.placed) for each in part)
    return all(len(each) % 8 == 0 for each in hashes)


def pack_blocks(blocks: Sequence[int]) -> bytes:
    """Return the hashes of a prompt's blocks as they are sent: of many, the first."""
    few = blocks[:MAX_BLOCKS]
    return struct.pack(f"<{len(few)}Q", *few)


def unpack_blocks(data: bytes) -> tuple[int, ...]:
    """Return the hashes that were packed."""
    return struct.unpack(f"<{len(data) // 8}Q", data)
