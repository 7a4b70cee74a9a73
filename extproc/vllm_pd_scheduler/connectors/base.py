"""The interface of a KV hand-off protocol."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any, ClassVar

import msgspec

from ..models import InstanceRole
from ..request.body import JsonBody
from ..request.handoff_key import HANDOFF_KEY

MAX_TOKENS = 100_000_000
"""Of a prompt: ten times the longest context that any model has."""

NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Order(Enum):
    """Which of the two legs of a request begins, and when D is chosen."""

    PREFILL_FIRST = "prefill first"
    """D is chosen when P has answered: what is known of it is fresher then."""
    TOWARDS_DECODE = "towards decode"
    """P answers first, but must be told of its D before. No other D gets the hand-off."""
    DECODE_FIRST = "decode first"
    """D begins, and asks for the prefill when it has room for it. Only then P gets anything."""
    TOGETHER = "together"
    """Both have the request at the same time, and P answers when D has the blocks. Each further attempt at D
    needs a new prefill."""


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is configured of an instance for its connector. A connector with settings has a subclass."""


@dataclass(frozen=True, slots=True)
class Peer:
    """An instance as its connector sees it."""

    id: str
    host: str
    """IP address at which the scheduler reaches it, or its name as long as that has none."""
    port: int
    """Of its HTTP server."""
    settings: Any
    """Of the connector's :attr:`Connector.settings_type`."""
    speaks: str = ""
    """The protocol of its last hand-off, as :attr:`Handoff.protocol`; empty before the first."""
    takes_token_ids: bool = False
    """As :attr:`Handoff.takes_token_ids` of its last hand-off."""
    rank: int | None = None
    """Which of its data-parallel engines gets the request, if the scheduler chooses among them."""
    ranks: int = 1
    """How many of them there are, as configured."""


@dataclass(frozen=True, slots=True)
class Question:
    """What each process of a P is asked once, by HTTP (GET, no TLS), before requests are split with it.

    Without a ``path`` it is only to take the connection: its answer is empty then.
    """

    port: int
    path: str | None


@dataclass(frozen=True, slots=True)
class Abort:
    """What ends one leg of an attempt, by HTTP (POST), at the instance that has it."""

    path: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Switch:
    """What gives an idle engine another role, by HTTP (POST)."""

    path: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Legs:
    """One attempt to split a request."""

    id: str
    """Letters, digits and `-`, and no other attempt's, also after a restart."""
    prefill: Peer
    known: Any = None
    """What :meth:`Connector.understood` has made of P's answer to the connector's question, or
    :meth:`Connector.asked` of D's call."""
    decode: Peer | None = None
    """The D that gets the hand-off, if the connector needs to know it before P does anything."""
    source: Peer | None = None
    """From which P is to pull the part of the prompt that it has cached, if its connector can do that."""
    token_ids: bool = False
    """Whether P is to tell the token ids of the prompt, so that D need not find them again."""


@dataclass(frozen=True, slots=True)
class Handoff:
    """A prompt's KV cache on P, and how D fetches it.

    It is for one decode request only. P frees the blocks when they were fetched or when its lease ends, so
    whoever uses a hand-off again, or too late, reads another prompt's blocks and answers with a wrong text.
    """

    params: bytes
    """JSON text of the field ``kv_transfer_params`` of the decode request; empty if D needs none.

    Another :meth:`Connector.splice` may do something else with it.
    """
    prompt_tokens: int | None = None
    """Tokens of the prompt as P counted them; ``None`` if it does not say. The load model learns from it."""
    cached_tokens: int | None = None
    """How many of them P had in its prefix cache; ``None`` if it does not say."""
    tells_cached: bool = False
    """Whether D learns :attr:`cached_tokens` from it. Else D counts as cached what it has got, and a header
    of the answer says what is right."""
    lease: float | None = None
    """Seconds for which P keeps it, from when its answer was read; it is used in the first 80 % of them.

    ``None``: ``kv_lease_duration`` of the configuration. ``inf`` if it cannot be too old.
    """
    pinned: bool = True
    """Whether P keeps the blocks for it, so that it must be used or freed: by
    :meth:`Connector.release_body`, or by the end of its lease."""
    headers: Mapping[str, str] = field(default_factory=lambda: NO_HEADERS)
    """Those of the decode request, and of the one that frees it, that belong to it; lower-case names."""
    release_path: str = "/v1/completions"
    """Path of the request to D that makes P free it (:meth:`Connector.release_body`)."""
    released_by: int = 400
    """HTTP status with which D answers that request."""
    token_ids: bytes = b""
    """JSON list of the prompt's token ids, for D; empty if it is to find them itself."""
    takes_token_ids: bool = False
    """Whether the answer shows that P's D reads token ids in ``kv_transfer_params``."""
    protocol: str = ""
    """The protocol that P's answer shows, of a connector that reads that from it: a connector's name."""


@dataclass(frozen=True, slots=True)
class Splice:
    """How D's request differs from the client's: from offset ``at`` of the body on, it is ``text``.

    The body itself need not be sent to Envoy, which has it. Another D, which gets no hand-off, gets the
    client's.
    """

    at: int
    text: bytes
    """UTF-8."""

    def into(self, body: bytes) -> bytes:
        """Return D's body."""
        return body[: self.at] + self.text


class Connector(ABC):
    """Makes the requests of the two legs, prefill and decode, from the client's body. Does no I/O."""

    settings_type: ClassVar[type[Settings]] = Settings
    """What can be configured of an instance."""
    can_pull: ClassVar[bool] = False
    """Whether P can pull what another instance has cached of a prompt, as :attr:`Legs.source` says."""

    needs_prefill: ClassVar[bool] = False
    """Whether a D serves nothing but what a P prefills. What cannot be split is then refused."""

    takes_ranks: ClassVar[bool] = True
    """Whether an instance can be told which of its data-parallel engines gets a request."""

    @abstractmethod
    def can_split(self, body: JsonBody) -> bool:
        """Whether a request can be split in prefill and decode. If not, a D serves it alone."""

    def order(self, prefill: Peer) -> Order:
        """Return which leg begins."""
        return Order.PREFILL_FIRST

    def question(self, prefill: Peer) -> Question | None:
        """Return what a P is to be asked before anything is sent to it; ``None`` if nothing is."""
        return None

    def understood(self, answer: bytes, prefill: Peer) -> Any | None:
        """Return what P's answer to the question (of status 200) says, or ``None`` if that is nonsense.

        It is kept as long as the process of P lives, and attempts have it as :attr:`Legs.known`.
        """
        return None

    def names_rank(self, legs: Legs) -> bool:
        """Whether the hand-off names the data-parallel engine that a leg is sent to.

        Such a request is split only on paths of which vLLM reads what engine is meant.
        """
        return False

    def invitation(self, legs: Legs, url: str) -> Handoff:
        """Return what D gets to ask for the prefill, by a POST to ``url``, with ``Order.DECODE_FIRST``."""
        raise NotImplementedError

    def asked(self, call: bytes, legs: Legs) -> Any | None:
        """Return what the body of D's call says, or ``None`` if that is nonsense.

        Attempts have it as :attr:`Legs.known`.
        """
        return None

    @abstractmethod
    def prefill_body(self, body: JsonBody, legs: Legs) -> bytes | None:
        """Return the body of the request to P; ``None`` if P can do nothing for it: D serves it alone."""

    def prefill_headers(self, legs: Legs) -> Mapping[str, str]:
        """Return headers of the request to P, by lower-case names, that the client's cannot replace."""
        return NO_HEADERS

    def promised(self, legs: Legs) -> Handoff | None:
        """Return the hand-off that P will make, before it has answered, for legs that begin together."""
        return None

    def abort(self, legs: Legs) -> Abort | None:
        """Return what ends either leg at its instance; ``None`` if only the end of the connection does."""
        return None

    def switch(self, role: InstanceRole) -> Switch | None:
        """Return what gives an idle engine another role; ``None`` if it need not be told."""
        return None

    @abstractmethod
    def handoff(self, answer: bytes, legs: Legs) -> Handoff | None:
        """Return the hand-off in P's answer (of status 200), or ``None`` if it has none that D could use."""

    def ended(self, answer: bytes) -> bool:
        """Whether prefill's answer (status 200) was whole with its first token, so that nothing is left.

        That is not the instance's failure: an instance without its connector answers in full length.
        """
        return False

    def splice(self, body: JsonBody, handoff: Handoff) -> Splice | None:
        """Return how the hand-off goes into the client's body (``body.raw``), for D: as its last field.

        ``None``: D gets the client's body as it is.
        """
        return Splice(*body.one_more(HANDOFF_KEY, handoff.params)) if handoff.params else None

    def release_body(self, handoff: Handoff, model: str | None) -> bytes | None:
        """Return the body of a request to D by which P frees the blocks of the hand-off.

        It goes to the hand-off's ``release_path``, with its headers. ``None`` if there is none, and the
        hand-off is left to its lease.
        """
        return None
