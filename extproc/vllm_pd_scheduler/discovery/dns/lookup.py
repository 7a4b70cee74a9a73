"""Asks DNS for the servers behind a name. Blocks: it is for a thread of its own."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, NoReturn

import dns.asyncresolver
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rdatatype
import dns.resolver

from ...models import join_address

QUERY_S = 5.0
"""Seconds that one query may take, all name servers and attempts together."""

WHOLE_S = 20.0
"""Seconds that a look-up may take, with the addresses of all targets."""

_UDP_BYTES = 1232
"""What an answer may have by UDP: as much as passes every network in one piece."""

_LONGEST_CHAIN = 8
"""Aliases that are followed, beyond those that one answer follows itself."""

_AT_ONCE = 32
"""Queries for targets of SRV records that are under way at most."""


class LookUpFailed(Exception):
    """Nothing is known: no server has said what there is; ``args[0]`` says why, for people."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and whom."""

    name: str
    port: int | None
    """Port of every address; ``None`` asks for SRV records, which name it."""
    resolver: tuple[str, int] | None = None
    """Address and port of the DNS server; ``None``: as ``/etc/resolv.conf`` says, with its search list."""


@dataclass(frozen=True, slots=True, order=True)
class Server:
    """One server that DNS tells of."""

    host: str
    """IP address, as DNS writes it."""
    port: int
    name: str
    """The name that leads to this address: that of the SRV record, else the one that was asked for."""


@dataclass(frozen=True, slots=True)
class Found:
    """What DNS has said; no servers if it has said that there are none."""

    servers: frozenset[Server]
    ttl: float
    """Seconds for which that holds."""


def look_up(question: Question) -> Found:
    """Return what DNS says now; raise :exc:`LookUpFailed`.

    Of a name with both IPv4 and IPv6 addresses the IPv4 ones count: both lead to the same servers.
    """
    try:
        return asyncio.run(_look_up(question))
    except TimeoutError:
        raise LookUpFailed(f"{question.name}: no whole answer within {WHOLE_S:g} s") from None
    except dns.resolver.NoResolverConfiguration as error:
        raise LookUpFailed(f"{question.name}: /etc/resolv.conf: {error}") from None
    except (dns.exception.DNSException, ValueError) as error:
        raise LookUpFailed(f"{question.name}: {error}") from None
    except OSError as error:  # no sockets are left, say
        raise LookUpFailed(f"{question.name}: {error.strerror or error}") from None


async def _look_up(question: Question) -> Found:
    async with asyncio.timeout(WHOLE_S):
        asking = _Asking(question)
        if question.port is not None:
            hosts, ttl = await asking.addresses(question.name)
            return Found(frozenset(Server(host, question.port, question.name) for host in hosts), ttl)
        return await asking.service(question.name)


class _Asking:
    """One look-up: the resolver, as ``/etc/resolv.conf`` has it now."""

    def __init__(self, question: Question) -> None:
        where = question.resolver
        self._resolver = dns.asyncresolver.Resolver(configure=where is None)
        if where is not None:
            self._resolver.nameservers = [where[0]]
            self._resolver.port = where[1]
        self._resolver.use_edns(0, 0, _UDP_BYTES)
        self._search = where is None
        self._few = asyncio.Semaphore(_AT_ONCE)

    async def addresses(self, name: str) -> tuple[list[str], float]:
        """Return the addresses of a name, and for how long they are its; raise :exc:`LookUpFailed`."""
        ttl = 0.0
        for kind in (dns.rdatatype.A, dns.rdatatype.AAAA):
            answer = await self._ask(name, kind)
            if answer is None:
                break  # there is no such name
            ttl = _ttl(answer)
            if answer.rrset is not None:
                return [record.address for record in answer.rrset], ttl
        return [], ttl

    async def service(self, name: str) -> Found:
        """Return the servers that SRV records name; raise :exc:`LookUpFailed`."""
        answer = await self._ask(name, dns.rdatatype.SRV)
        if answer is None or answer.rrset is None:
            return Found(frozenset(), 0.0 if answer is None else _ttl(answer))
        records = [each for each in answer.rrset if each.target != dns.name.root]  # which says: none
        told = _told_along(answer.response)
        missing = list(dict.fromkeys(each.target for each in records if each.target not in told))
        for target, found in zip(missing, await asyncio.gather(*map(self._target, missing)), strict=True):
            told[target] = found
        servers = frozenset(
            Server(host, record.port, record.target.to_text(omit_final_dot=True))
            for record in records
            for host in told[record.target][0]
        )
        return Found(servers, min([_ttl(answer), *(told[each.target][1] for each in records)]))

    async def _target(self, target: dns.name.Name) -> tuple[list[str], float]:
        async with self._few:
            return await self.addresses(target.to_text())

    async def _ask(self, name: str, kind: dns.rdatatype.RdataType) -> dns.resolver.Answer | None:
        """Return an answer, ``None`` if there is no such name; raise :exc:`LookUpFailed`."""
        asked: str | dns.name.Name = name
        for _ in range(_LONGEST_CHAIN):
            try:
                answer = await self._resolver.resolve(
                    asked, kind, search=self._search, raise_on_no_answer=False, lifetime=QUERY_S
                )
            except dns.resolver.NXDOMAIN:
                return None
            except (dns.resolver.NoNameservers, dns.resolver.LifetimeTimeout) as error:
                _fail(name, kind, error)
            if answer.response.flags & dns.flags.TC:
                raise LookUpFailed(f"{name} {kind.name}: more records than one answer can have")
            if answer.rrset is not None or answer.canonical_name == answer.qname:
                return answer
            asked = answer.canonical_name  # an alias whose other end is not in the answer
        raise LookUpFailed(f"{name} {kind.name}: an alias of an alias, more than {_LONGEST_CHAIN} times")


def _told_along(response: dns.message.Message) -> dict[dns.name.Name, tuple[list[str], float]]:
    """Return the addresses that an answer has along with its SRV records, IPv4 before IPv6."""
    told: dict[dns.name.Name, tuple[list[str], float]] = {}
    for kind in (dns.rdatatype.A, dns.rdatatype.AAAA):
        for rrset in response.additional:
            if rrset.rdtype == kind and rrset.name not in told:
                told[rrset.name] = ([record.address for record in rrset], float(rrset.ttl))
    return told


def _ttl(answer: dns.resolver.Answer) -> float:
    return float(answer.chaining_result.minimum_ttl)


def _fail(name: str, kind: dns.rdatatype.RdataType, error: Any) -> NoReturn:
    """Raise :exc:`LookUpFailed` with what each server did, the last time that it was asked."""
    last = {}
    for server, _, port, what, _ in error.kwargs.get("errors") or ():
        last[join_address(server.removeprefix("Do53:").rpartition("@")[0], port)] = what
    said = "; ".join(f"{server}: {_said(what)}" for server, what in last.items())
    raise LookUpFailed(f"{name} {kind.name}: {said or 'no answer'}") from None


def _said(what: object) -> str:
    """Return what a server did, in words that stay the same while it does."""
    if isinstance(what, dns.exception.Timeout):
        return "no answer"
    if isinstance(what, OSError):
        return what.strerror or str(what)
    if isinstance(what, dns.exception.DNSException):
        return str(what) or "an answer that makes no sense"
    return str(what)
