"""Requests on a pool of connections, to a server that a test plays by hand."""

from __future__ import annotations

import asyncio
import socket

from tests.support.raw_server import Peer, RawServer
from tests.support.waiting import HUNG_S
from vllm_pd_scheduler.instance_http.exchange import Answer, Destination
from vllm_pd_scheduler.instance_http.pool import ConnectionPool

PATH = "/v1/completions"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n%s\r\nok"
ANSWER = OK % b""
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n"
HALF = b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf"


def post(
    pool: ConnectionPool,
    to: Destination,
    body: bytes = b"{}",
    limit: int = 100,
    timeout: float = HUNG_S,
    name: bytes = b"",
    **headers: str,
) -> asyncio.Future[Answer]:
    return pool.post(to, PATH, headers, body, limit=limit, timeout=timeout, name=name)


async def one(pool: ConnectionPool, server: RawServer, answer: bytes = ANSWER) -> Peer:
    """Have a request answered on a new connection; return that connection."""
    sent = post(pool, server.to)
    peer = await server.accept()
    await peer.request()
    await peer.say(answer)
    assert (await sent).body == b"ok"
    return peer


def waits(peer: Peer) -> bool:
    """Whether a part of a request has arrived."""
    try:
        return bool(peer.connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
