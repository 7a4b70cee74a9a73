"""What the scheduler knows of one request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from msgspec import Struct, field
from msgspec.structs import force_setattr

from ..prediction.prefix_index import Holder, PrefixIndex, PrefixMatch
from ..prediction.transfer_rates import HandOffs
from .headers import REQUEST_ID

_NO_MATCH = PrefixIndex().match(())


class HasHolder(Protocol):
    """What :attr:`RequestContext.cached` tells of: an endpoint, which the room ``fleet`` defines."""

    @property
    def holder(self) -> Holder:
        """Its cached prefixes."""
        ...


class RequestContext(Struct, frozen=True, eq=False):
    """What a strategy may know of a request. Never its text.

    No attribute can be set: each change is a method that says what has happened.

    ``now`` is set, and ``cached`` looked up, anew for each pick. ``blocks`` are chained hashes of the
    prompt's leading blocks, ``block_tokens`` tokens each, and empty if no strategy in use reads them.
    """

    path: str
    model: str | None = None
    body_bytes: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    prompt_bytes: int = 0
    """Size of the prompt, of which its length in tokens is estimated; 0 if that is exact."""
    prompt_tokens: float = 0.0
    """Length of the prompt: estimated from its bytes, exact once prefill has read it."""
    output_tokens: float = 0.0
    """Expected length of the answer."""
    blocks: Sequence[int] = ()
    block_tokens: float = 0.0
    fingerprint: int = 0
    """By which the same prompt is known again, in this process; 0 if it has none."""
    answer_limit: int | None = None
    """Tokens that the client allows the answer; ``None`` without a limit."""
    stream: bool = False
    """Whether the client wants its answer as a stream of events."""
    priority: int = 0
    """Higher is served first when requests have to wait."""
    tenant: str = ""
    """Whom a request counts for when those who wait are served in turn."""
    subset: frozenset[str] | None = None
    """To which D it may go, by ``ip:port`` or ``ip``, if whoever asks says so. Its P may be any."""
    session: str | None = None
    """What the requests of one conversation have in common."""
    revision: str | None = None
    """The [revision](models.md#roll-outs) that was chosen for it; ``None`` where none is chosen."""
    ttft_slo: float | None = None
    """Seconds to the first token that the client asks for."""
    tpot_slo: float | None = None
    """Seconds for each further token that the client asks for."""
    arrived: float = 0.0
    now: float = 0.0
    """Time of this pick, monotonic seconds."""
    handoffs: HandOffs | None = None
    """What it takes to hand it over from the P that has prefilled it; ``None``: no P has."""
    _index: PrefixIndex | None = None
    _offered: Sequence[HasHolder] | None = None
    _match: PrefixMatch | None = None
    _cached: Mapping[Holder, int] | None = None
    _known: tuple[tuple[Sequence[HasHolder], Mapping[Holder, int]], ...] = ()
    """What was cached of those that were offered last, as long as the index says the same."""

    @property
    def request_id(self) -> str:
        """Its id for people; empty if it has none."""
        return self.headers.get(REQUEST_ID, "")

    @property
    def cached(self) -> Mapping[Holder, int]:
        """Leading blocks that are taken for cached, by ``Endpoint.holder``, of the endpoints to choose from.

        Looked up when first read after a pick began: a pick that does not read it need not pay for that.
        """
        if self._cached is None:
            found = self.match if self._offered is None else self._among(self._offered)
            force_setattr(self, "_cached", found)
            return found
        return self._cached

    @property
    def match(self) -> PrefixMatch:
        """Leading blocks that are taken for cached, of all endpoints of both roles."""
        if self._match is None:
            found = self._index.match(self.blocks) if self._index is not None else _NO_MATCH
            force_setattr(self, "_match", found)
            return found
        return self._match

    def _among(self, offered: Sequence[HasHolder]) -> Mapping[Holder, int]:
        """Return what is cached of those that are offered: those of P are again, after those of D."""
        for endpoints, found in self._known:
            if endpoints is offered:
                return found
        found = self.match.among([endpoint.holder for endpoint in offered])
        force_setattr(self, "_known", (*self._known[-1:], (offered, found)))
        return found

    def asks(self, *, priority: int, tenant: str, ttft_slo: float | None, tpot_slo: float | None) -> None:
        """Set what its client asks for; ``None`` leaves a limit as it is configured."""
        force_setattr(self, "priority", priority)
        force_setattr(self, "tenant", tenant)
        if ttft_slo is not None:
            force_setattr(self, "ttft_slo", ttft_slo)
        if tpot_slo is not None:
            force_setattr(self, "tpot_slo", tpot_slo)

    def limited_to(self, subset: frozenset[str] | None) -> None:
        """Set to which D it may go; ``None``: to all."""
        if subset is not None:
            force_setattr(self, "subset", subset)

    def goes_to(self, revision: str) -> None:
        """Set the revision that was chosen for it."""
        force_setattr(self, "revision", revision)

    def at(self, now: float) -> None:
        """Set the time of the next pick."""
        force_setattr(self, "now", now)

    def counted(self, prompt_tokens: float) -> None:
        """Set the length of the prompt, since P has counted it."""
        force_setattr(self, "prompt_tokens", prompt_tokens)

    def prefilled_by(self, handoffs: HandOffs | None) -> None:
        """Set what it takes to hand it over from its P, if it has one."""
        force_setattr(self, "handoffs", handoffs)

    def look_up_in(self, index: PrefixIndex) -> None:
        """Forget what was cached if that has changed, and look it up in ``index`` when it is read."""
        force_setattr(self, "_offered", None)
        force_setattr(self, "_cached", None)
        if self._match is not None and self._match.holds(index):
            return
        force_setattr(self, "_index", index)
        force_setattr(self, "_match", None)
        force_setattr(self, "_known", ())

    def offer(self, endpoints: Sequence[HasHolder]) -> None:
        """Let :attr:`cached` tell of these endpoints."""
        force_setattr(self, "_offered", endpoints)
        force_setattr(self, "_cached", None)

    def cached_blocks(self, holder: Holder) -> int:
        """Return the leading blocks that are taken for cached at one holder, whichever it is."""
        if not self.blocks:
            return 0
        found = None if self._cached is None else self._cached.get(holder)
        return self.match.get(holder, 0) if found is None else found

    def uncached(self, holder: Holder, trust: float = 1.0) -> float:
        """Tokens of the prompt to compute where ``holder`` is; ``trust``: share of the cached that count.

        Where the turn before was answered, its answer is taken for a part of the prompt, and for cached.
        """
        if not self.blocks:
            return max(1.0, self.prompt_tokens)
        cached = holder.with_answer(self.blocks, self.cached_blocks(holder))
        return max(1.0, self.prompt_tokens - trust * cached * self.block_tokens)
