"""What replicas tell each other, and how that is written.

A message is ``PDR``, the format's version (one byte), the fleet's key (8 bytes) and a MessagePack array.
Loads, verdicts and draws are told as sums that stand for themselves, not as differences: one that is lost is
mended by the next, one that comes twice changes nothing. What cannot be told so, where prompts are cached, is
numbered by its message, so who misses one can ask for it (:class:`Ask`). Endpoints are indices of a list in
the same message. There is no time of day in it, since clocks differ, and nothing of a prompt or a
tenant but hashes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from enum import StrEnum
from hashlib import blake2b
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

VERSION = 2
MAX_BYTES = 1 << 20
"""Of a message. What is longer is not read."""
MAX_ITEMS = 10_000
"""In each list of a message."""
MAX_BLOCKS = 4096
"""Of one prompt whose placement is told: the beginning of a longer one."""
MAX_HELD = 20_000
"""Blocks of one endpoint that are told to one who joins: those used last."""
MAX_PART = 2_500
"""Of these in one message: to record so many takes 3 ms."""
MAX_ASKED = 8
"""Endpoints whose blocks one asks for at once."""
MAX_REQUESTS = 10_000
"""Requests of one replica on one endpoint, at most."""
MAX_TOKENS = 1_000_000_000
"""Tokens of those."""
MAX_PROMPT = 10_000_000
"""Tokens of one prompt."""
MAX_FOUND_BYTES = 1 << 15
"""Of what was found at one instance: 64 ranks have some 14 KB."""
MAX_OVERHEAD_S = 10.0
"""The fixed cost of a prefill or a step is surely less."""
MAX_TOKEN_S = 0.1
"""As is what a token, a pair of tokens or a request adds."""
MAX_FACTOR = 3.0
"""Logarithm of how many times as long as usual the hand-offs of a pair can take."""
MAX_WORK_S = 1e9
"""Seconds that a tenant was served in all."""

_MAGIC = b"PDR"
_HEADER = len(_MAGIC) + 1 + 8

Index = Annotated[int, Meta(ge=0, lt=MAX_ITEMS)]
Number = Annotated[int, Meta(ge=0, lt=1 << 62)]
Prompt = Annotated[int, Meta(ge=0, le=MAX_PROMPT)]
Blocks = Annotated[bytes, Meta(max_length=8 * MAX_BLOCKS)]
SHOWN = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*\Z"
"""What can be in a line of the log and leaves it one line: no control characters."""
Name = Annotated[str, Meta(min_length=1, max_length=256, pattern=SHOWN)]
EndpointName = Annotated[str, Meta(min_length=1, max_length=256)] | Annotated[int, Meta(ge=0, lt=1 << 32)]
Count = Annotated[int, Meta(ge=0, lt=1 << 16)]
"""How often something has happened, modulo 65,536."""
Overhead = Annotated[float, Meta(ge=0.0, le=MAX_OVERHEAD_S)]
Slope = Annotated[float, Meta(ge=0.0, le=MAX_TOKEN_S)]
Coefficients = tuple[Overhead, Slope, Slope]
Factor = Annotated[float, Meta(ge=-MAX_FACTOR, le=MAX_FACTOR)]


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
    TOO_OFTEN = "too often"
    """One replica sends far more than there can be to tell."""


class Disbelieved(StrEnum):
    """Which claims of a message that was used were not believed, or not in full."""

    LOAD = "load"
    """More requests or tokens on an instance than it says itself that it has."""
    PREFILLS = "prefills"
    """Prefills that were queued on a P long before it said that it has none."""
    EJECTIONS = "ejections"
    """More than may be out by the word of one, or of an instance that serves us."""
    TRIALS = "trials"
    """One that runs for more than a minute."""
    RECOVERIES = "recoveries"
    """Before the pause after an ejection is over."""
    PAIRS = "pairs"
    """More than may be left out by the word of one."""
    TIMES = "times"
    """Prefills much faster or slower than all that is known, or more of them than there can be."""
    FINDINGS = "findings"
    """Of a probe of an instance: numbers outside their ranges, or ranks that it has not."""
    DRAWS = "draws"
    """More work for tenants than the fleet can have done."""


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
    ejections: Count = 0
    """How often its requests had the endpoint ejected."""
    recoveries: Count = 0
    """How often a trial request of its own went well."""
    out: bool = False
    """Whether it takes the endpoint for ejected now, for one who joins."""
    handoffs: Number = 0
    """Hand-offs that a P holds for it, as a summary tells; at once of a P that drains."""


class Prefill(Struct, array_like=True, frozen=True):
    """A prefill that was sent to a P."""

    number: Number
    """Names it, of this replica's."""
    endpoint: Index
    prompt: Prompt
    cached: Prompt = 0
    """Tokens that P need not compute: taken for cached there, or pulled from elsewhere."""
    cached_blocks: Annotated[int, Meta(ge=0, le=MAX_PROMPT)] = 0
    """Leading blocks that are taken for cached there."""
    blocks: Blocks = b""
    """Of its prompt: hashes of 8 bytes each. A summary has none, nor one that is claimed."""
    claimed: bool = False
    """Whether it only has claimed its place: :class:`Sent` says when it is on its way, or it ends."""


class Sent(Struct, array_like=True, frozen=True):
    """A prefill that was told as claimed, and is on its way now: its prompt will be cached there."""

    number: Number
    endpoint: Index
    blocks: Blocks = b""


class Ended(Struct, array_like=True, frozen=True):
    """A prefill that is queued no more; with ``prompt`` it was done, and can be learned from."""

    number: Number
    prompt: Prompt = 0
    cached: Annotated[int, Meta(ge=-1, le=MAX_PROMPT)] = -1
    """Tokens of the prompt that P had cached; -1 if it does not say."""


class Placement(Struct, array_like=True, frozen=True):
    """A prompt that is cached on an endpoint from now on, other than by a new :class:`Prefill`."""

    endpoint: Index
    blocks: Blocks = b""
    prefill: Number = 0
    """If not 0: the blocks are those of that prefill, which was told before."""


class Learned(Struct, array_like=True, frozen=True):
    """Coefficients of the load model, for a replica that has learned nothing yet."""

    prefill: Coefficients
    decode: Coefficients


class Found(Struct, array_like=True, frozen=True):
    """What a probe of an instance has found, as :mod:`vllm_pd_scheduler.health.finding` writes it."""

    endpoint: Index
    told: Annotated[bytes, Meta(max_length=MAX_FOUND_BYTES)]


class Drawn(Struct, array_like=True, frozen=True):
    """What a tenant was served while requests waited."""

    priority: Annotated[int, Meta(ge=-(1 << 31), lt=1 << 31)]
    tenant: Annotated[bytes, Meta(min_length=8, max_length=8)]
    """A hash of its name."""
    work: Annotated[float, Meta(ge=0.0, le=MAX_WORK_S)]
    """Predicted seconds of prefill, in all."""


class PairVerdict(Struct, array_like=True, frozen=True):
    """What a replica has found of the hand-offs of a P to a D, or to any."""

    prefill: Index
    decode: Annotated[int, Meta(ge=-1, lt=MAX_ITEMS)]
    """-1: all of the P's."""
    wrong: bool
    """Whether its texts, and not its transfers, are the matter."""
    out: Count
    """How often it left the pair out."""
    back: Count
    """How often it found that the pair works."""
    stands: bool
    """Whether it is left out now, for one who joins."""


class Handed(Struct, array_like=True, frozen=True):
    """Hand-offs of a P that are on their way to a D since the message before."""

    prefill: Index
    decode: Index
    count: Annotated[int, Meta(ge=1, le=MAX_REQUESTS)]


class Ask(Struct, array_like=True, frozen=True):
    """What a replica asks of one other: the rest of what it has missed."""

    replica: Name
    first: Number = 0
    """The placements that its messages from this number on,"""
    last: Number = 0
    """up to this one, have told; none if this is 0."""
    endpoints: Annotated[list[Index], Meta(max_length=MAX_ASKED)] = []
    """All blocks that it takes for cached on these."""
    rates: bool = False
    """What it has learned of pairs of P and D."""


class Held(Struct, array_like=True, frozen=True):
    """Blocks that are taken for cached on an endpoint, those used last first: who asks is told."""

    endpoint: Index
    blocks: Annotated[bytes, Meta(max_length=8 * MAX_PART)]
    before: Number = 0
    """How many used later the messages before have told."""
    more: bool = False
    """Whether another message has those used before."""


class Rates(Struct, array_like=True, frozen=True):
    """What hand-offs take, as the logarithms of how many times as long as the fleet's they are."""

    fleet: tuple[Overhead, Slope]
    instances: Annotated[list[tuple[Index, Factor]], Meta(max_length=MAX_ITEMS)]
    pairs: Annotated[list[tuple[Index, Index, Factor]], Meta(max_length=MAX_ITEMS)]


class Message(Struct, array_like=True, frozen=True):
    """What a replica did since its message before; with ``summary`` all that it has, and nothing else.

    Fields are only ever added at the end.
    """

    replica: Name
    number: Annotated[int, Meta(ge=1, lt=1 << 62)]
    """One more for each message of a replica."""
    summary: bool
    waiting: tuple[Number, Number]
    """Requests in its queue, for P and for D."""
    endpoints: Annotated[list[EndpointName], Meta(max_length=MAX_ITEMS)]
    """See :class:`.directory.Directory`."""
    shares: Annotated[list[Share], Meta(max_length=MAX_ITEMS)] = []
    prefills: Annotated[list[Prefill], Meta(max_length=MAX_ITEMS)] = []
    ended: Annotated[list[Ended], Meta(max_length=MAX_ITEMS)] = []
    placed: Annotated[list[Placement], Meta(max_length=MAX_ITEMS)] = []
    learned: Learned | None = None
    drawn: Annotated[list[Drawn], Meta(max_length=MAX_ITEMS)] = []
    pairs: Annotated[list[PairVerdict], Meta(max_length=MAX_ITEMS)] = []
    handed: Annotated[list[Handed], Meta(max_length=MAX_ITEMS)] = []
    asks: Annotated[list[Ask], Meta(max_length=MAX_ITEMS)] = []
    held: Held | None = None
    rates: Rates | None = None
    blocks: Number = 0
    """Of a summary: how many it takes for cached on all endpoints."""
    probing: Annotated[list[Index], Meta(max_length=MAX_ITEMS)] = []
    """Instances that it asks just now how they are, for all replicas; each by an endpoint."""
    found: Annotated[list[Found], Meta(max_length=MAX_ITEMS)] = []
    sent: Annotated[list[Sent], Meta(max_length=MAX_ITEMS)] = []


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
        if not _sound(message):
            raise Unreadable(Ignored.GARBAGE)
        return message


def _sound(message: Message) -> bool:
    """Whether all places that a message names are in its list of endpoints, and all its hashes are whole."""
    count = len(message.endpoints)
    for share in message.shares:
        if share.endpoint >= count:
            return False
    for prefill in message.prefills:
        if prefill.endpoint >= count or len(prefill.blocks) % 8:
            return False
    for placed in message.placed:
        if placed.endpoint >= count or len(placed.blocks) % 8:
            return False
    for sent in message.sent:
        if sent.endpoint >= count or len(sent.blocks) % 8:
            return False
    for handed in message.handed:
        if handed.prefill >= count or handed.decode >= count:
            return False
    held = message.held
    if held is not None and len(held.blocks) % 8:
        return False
    return max(_rare_places(message), default=-1) < count


def _rare_places(message: Message) -> Iterator[int]:
    """Yield the places that are named by what few messages have."""
    yield from message.probing
    for found in message.found:
        yield found.endpoint
    for pair in message.pairs:
        yield from (pair.prefill, pair.decode)
    for ask in message.asks:
        yield from ask.endpoints
    if message.held is not None:
        yield message.held.endpoint
    if message.rates is not None:
        yield from (place for place, _ in message.rates.instances)
        for prefill, decode, _ in message.rates.pairs:
            yield from (prefill, decode)


def pack_blocks(blocks: Sequence[int]) -> bytes:
    """Return the hashes of blocks as they are sent."""
    return struct.pack(f"<{len(blocks)}Q", *blocks)


def unpack_blocks(data: bytes) -> tuple[int, ...]:
    """Return the hashes that were packed."""
    return struct.unpack(f"<{len(data) // 8}Q", data)
