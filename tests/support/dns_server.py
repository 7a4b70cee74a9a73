"""A DNS server on loopback, by UDP and TCP, whose answers a test sets and whose faults it chooses."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Literal, cast

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset

Fault = Literal["servfail", "refused", "silent", "garbage", "cut", "other"]
"""What the server does in place of an answer: ``cut`` ends in the middle, ``other`` answers another query."""

_UDP_BYTES = 512


class DnsServer:
    """The server. A name that has no records at all is NXDOMAIN, one without those asked for NODATA."""

    port: int

    def __init__(self) -> None:
        self.fault: Fault | None = None
        self.faults: dict[str, Fault] = {}
        """Faults of queries of one type, ``AAAA`` say."""
        self.negative_ttl = 5
        self.asked: list[tuple[str, str, str]] = []
        """Transport, name and type of each query."""
        self.cut_by_tcp = False
        self._records: dict[tuple[dns.name.Name, dns.rdatatype.RdataType], dns.rrset.RRset] = {}
        self._along: list[dns.rrset.RRset] = []

    def set(self, name: str, kind: str, *values: str, ttl: int = 1) -> None:
        """Give a name these records of a type; none: it is there and has none of that type."""
        owner = dns.name.from_text(name)
        rrset = dns.rrset.from_text_list(owner, ttl, "IN", kind, list(values))
        self._records[owner, rrset.rdtype] = rrset

    def along(self, name: str, kind: str, *values: str, ttl: int = 1) -> None:
        """Send these records along with each answer, in its additional section."""
        self._along.append(dns.rrset.from_text_list(name, ttl, "IN", kind, list(values)))

    def forget(self, name: str) -> None:
        """Take a name away: it is NXDOMAIN."""
        owner = dns.name.from_text(name)
        self._records = {key: each for key, each in self._records.items() if key[0] != owner}

    def answer(self, wire: bytes, transport: Literal["udp", "tcp"]) -> bytes | None:
        """Return what goes back for a query, ``None`` for silence."""
        query = dns.message.from_wire(wire)
        question = query.question[0]
        kind = dns.rdatatype.to_text(question.rdtype)
        self.asked.append((transport, question.name.to_text(), kind))
        fault = self.fault or self.faults.get(kind)
        if fault == "silent":
            return None
        if fault == "garbage":
            return wire[:2] + b"\xff" * 30
        response = dns.message.make_response(query, recursion_available=True)
        if fault in ("servfail", "refused"):
            response.set_rcode(dns.rcode.from_text(fault.upper()))
            return response.to_wire()
        self._fill(response, question)
        if fault == "other":
            response.id ^= 1
        response.additional.extend(self._along)
        room = _UDP_BYTES if query.edns < 0 else query.payload
        full = response.to_wire(max_size=65535)
        if fault == "cut":
            return full[: len(full) // 2]
        if (transport == "udp" and len(full) > room) or (transport == "tcp" and self.cut_by_tcp):
            del response.additional[:]
            response.answer = [_first(each) for each in response.answer]
            response.flags |= dns.flags.TC
            return response.to_wire()
        return full

    def _fill(self, response: dns.message.Message, question: dns.rrset.RRset) -> None:
        name = question.name
        for _ in range(20):  # aliases
            found = self._records.get((name, question.rdtype))
            if found is not None and len(found):
                response.answer.append(found)
                return
            alias = self._records.get((name, dns.rdatatype.CNAME))
            if alias is None:
                break
            response.answer.append(alias)
            name = alias[0].target
            if name.to_text().startswith("elsewhere"):
                return  # as a server answers that does not know the other end
        if all(owner != name for owner, _ in self._records):
            response.set_rcode(dns.rcode.NXDOMAIN)
        soa = f"ns. root. 1 7200 1800 86400 {self.negative_ttl}"
        response.authority.append(dns.rrset.from_text(".", self.negative_ttl, "IN", "SOA", soa))


def _first(rrset: dns.rrset.RRset) -> dns.rrset.RRset:
    return dns.rrset.from_rdata(rrset.name, rrset.ttl, rrset[0])


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, answer: Callable[[bytes], bytes | None]) -> None:
        self._answer = answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        if (answer := self._answer(data)) is not None:
            self._transport.sendto(answer, address)


@contextlib.asynccontextmanager
async def dns_server() -> AsyncIterator[DnsServer]:
    """Run a server at 127.0.0.1, in this event loop."""
    server = DnsServer()
    tcp, udp = await _listen(server)
    try:
        yield server
    finally:
        udp.close()
        tcp.close()


async def _listen(server: DnsServer) -> tuple[asyncio.Server, asyncio.BaseTransport]:
    """Take a port that is free for both."""
    while True:
        tcp = await asyncio.start_server(partial(_serve, server), "127.0.0.1", 0)
        server.port = tcp.sockets[0].getsockname()[1]
        try:
            udp, _ = await asyncio.get_running_loop().create_datagram_endpoint(
                lambda: _Udp(lambda data: server.answer(data, "udp")), ("127.0.0.1", server.port)
            )
        except OSError:
            tcp.close()
        else:
            return tcp, udp


async def _serve(server: DnsServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            (size,) = struct.unpack("!H", await reader.readexactly(2))
            answer = server.answer(await reader.readexactly(size), "tcp")
            if answer is not None:
                writer.write(struct.pack("!H", len(answer)) + answer)
                await writer.drain()
    writer.close()
