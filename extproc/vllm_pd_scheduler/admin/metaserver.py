"""The HTTP server at which D ask for prefills, as vllm-ascend's engines do: its ``metaserver``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus

from aiohttp import web

from ..config import SchedulerConfig
from ..models import is_ip, join_address
from ..routing.decode_first import Called, DecodeFirst
from ..system.own_address import own_address
from .http_server import HttpServer, errors_as_json
from .route import Refused, error_answer

MAX_CALL_BYTES = 16 << 20
"""Of a call: it names each block of the prompt, in each group of layers."""

READ_S = 10.0
"""For the body of a call: D sends it at once, over a network that KV caches cross."""

_REFUSALS = {
    Called.UNKNOWN: (HTTPStatus.NOT_FOUND, "no request that is in flight has this URL"),
    Called.ELSEWHERE: (HTTPStatus.FORBIDDEN, "the request is another instance's, by the caller's address"),
    Called.UNREADABLE: (HTTPStatus.BAD_REQUEST, "not what the connector of this instance needs"),
}


class Metaserver(HttpServer):
    """Gives the calls of D to ``decode_first``, and answers before the prefill is done.

    D does not read the answer, and as long as it waits for one, a thread of its few does.
    """

    def __init__(self, decode_first: DecodeFirst) -> None:
        super().__init__()
        self._decode_first = decode_first

    def application(self) -> web.Application:
        """Return the aiohttp application."""
        app = web.Application(middlewares=[errors_as_json], client_max_size=MAX_CALL_BYTES)
        app.router.add_post("/v1/metaserver/{id}", self._call)
        return app

    async def _call(self, request: web.Request) -> web.Response:
        host = (request.remote or "").partition("%")[0].removeprefix("::ffff:")
        id_ = request.match_info["id"]
        outcome = self._decode_first.not_for_us(id_, host)
        if outcome is None:  # only now: who calls for nothing could fill the memory with bodies
            try:
                async with asyncio.timeout(READ_S):
                    said = await request.read()
            except TimeoutError:
                raise Refused(HTTPStatus.REQUEST_TIMEOUT, f"the body did not come in {READ_S:g} s") from None
            outcome = self._decode_first.called(id_, host, said)
        if outcome in _REFUSALS:
            return error_answer(*_REFUSALS[outcome])
        return web.json_response({"outcome": outcome.value})


def url_for(config: SchedulerConfig) -> Callable[[str], str] | None:
    """Return what says for each host of a D where that finds this process; ``None`` if nowhere."""
    port, listens_at = config.metaserver_port, config.metaserver_host
    if port is None:
        return None
    if config.metaserver_url is not None:
        given = config.metaserver_url
        return lambda _: given
    scheme = "http" if config.metaserver_tls is None else "https"
    everywhere = listens_at in ("0.0.0.0", "::")

    def url(decode: str) -> str:
        own = own_address(decode) if everywhere and is_ip(decode) else listens_at
        return f"{scheme}://{join_address(own, port)}"

    return url
