"""What a probe has found at an instance that is well, as replicas of the scheduler tell each other.

It has what the instance has counted since its start, so that whoever reads it works out what is new by
itself, and nothing is lost with one that does not come. It is data of another process, so each number has
a range.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from ..fleet.endpoint import Endpoint
from ..models import MAX_RANKS
from .probe import Scrapes
from .vllm_metrics import HISTOGRAMS, MAX_CAPACITY, MAX_COUNT, MAX_REQUESTS, MAX_UNIX_TIME, Scrape

_MAX_ADAPTERS = 32
"""Of an instance that are told: those used last."""
_MAX_NAME = 256
_DIGEST = 8

_Requests = Annotated[float, Meta(ge=0.0, le=MAX_REQUESTS)]
_Share = Annotated[float, Meta(ge=0.0, le=1.0)]
_Count = Annotated[float, Meta(ge=0.0, le=MAX_COUNT)]
_Capacity = Annotated[float, Meta(gt=0.0, le=MAX_CAPACITY)]
_Time = Annotated[float, Meta(gt=0.0, le=MAX_UNIX_TIME)]
_Adapter = Annotated[str, Meta(min_length=1, max_length=_MAX_NAME)]


class NotAFinding(ValueError):
    """Bytes that tell nothing that can be."""


@dataclass(frozen=True, slots=True)
class Finding:
    """An instance that is well, and answers at ``address``."""

    address: str
    """``ip:port``."""
    models: bytes
    """A digest of what it lists; empty if that is not known."""
    pages: Scrapes
    """Of its ranks, or of the whole; empty if they could not be read."""


class _Page(Struct, array_like=True, frozen=True):
    """A :class:`Scrape`. Its histograms are in the order of ``HISTOGRAMS``."""

    running: _Requests
    waiting: _Requests
    kv_usage: _Share
    histograms: Annotated[list[tuple[_Count, _Count] | None], Meta(max_length=len(HISTOGRAMS))]
    started_at: _Time | None
    kv_capacity: _Capacity | None
    generated: _Count
    finished: _Count
    steps: _Count
    failed_transfers: _Count | None
    adapters: Annotated[list[_Adapter], Meta(max_length=_MAX_ADAPTERS)]
    adapter_slots: Annotated[int, Meta(ge=0, lt=10_000)]


class _Told(Struct, array_like=True, frozen=True):
    address: Annotated[str, Meta(max_length=64)]
    models: Annotated[bytes, Meta(max_length=_DIGEST)]
    pages: Annotated[list[_Page], Meta(max_length=MAX_RANKS)]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Told).decode


def write(finding: Finding) -> bytes:
    """Return a finding as it is told: some 100 bytes for a page."""
    return _encode(_Told(finding.address, finding.models, [_page(each) for each in finding.pages]))


def read(told: bytes) -> Finding:
    """Return the finding that is told; raises :exc:`NotAFinding`."""
    try:
        found = _decode(told)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise NotAFinding from None
    return Finding(found.address, found.models, [_scrape(each) for each in found.pages])


def digest_of(endpoint: Endpoint) -> bytes:
    """Return a digest of the models and adapters that an instance lists; empty if that is not known."""
    if endpoint.models.listed is None:
        return b""
    digest = blake2b(digest_size=_DIGEST)
    for names in (endpoint.models.listed, endpoint.models.adapters):
        digest.update(repr(sorted(names)).encode(errors="replace"))
    return digest.digest()


def _page(scrape: Scrape) -> _Page:
    found = (scrape.histograms.get(name) for name in HISTOGRAMS)
    return _Page(
        _short(scrape.running),
        _short(scrape.waiting),
        scrape.kv_usage,
        [None if each is None else (_short(each[0]), _short(each[1])) for each in found],
        scrape.started_at,
        None if scrape.kv_capacity is None else _short(scrape.kv_capacity),
        _short(scrape.generated),
        _short(scrape.finished),
        _short(scrape.steps),
        None if scrape.failed_transfers is None else _short(scrape.failed_transfers),
        [name for name in _last(scrape.adapters) if len(name) <= _MAX_NAME],
        scrape.adapter_slots,
    )


def _scrape(page: _Page) -> Scrape:
    histograms = {name: pair for name, pair in zip(HISTOGRAMS, page.histograms, strict=False) if pair}
    return Scrape(
        page.running,
        page.waiting,
        page.kv_usage,
        histograms,
        page.started_at,
        page.kv_capacity,
        page.generated,
        page.finished,
        page.steps,
        page.failed_transfers,
        tuple(page.adapters),
        page.adapter_slots,
    )


def _short(number: float) -> float:
    """Return a number that is whole as one that is written in fewer bytes."""
    whole = int(number)
    return whole if whole == number else number


def _last(names: Iterable[str]) -> list[str]:
    return list(names)[-_MAX_ADAPTERS:]
