"""What a simulated instance tells other engines: the blocks of its hand-offs, and where they are found."""

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from .ascend_layerwise import PUSH_PATH, PushCall
from .handoff import FETCH_PATH, RELEASE_PATH, FetchCall, FetchReply
from .mooncake import PULL_PATH, QUERY_PATH, MooncakeConnector, PullCall, query_answer, sent_as
from .offloading import (
    P2P_FETCH_PATH,
    P2P_LOOKUP_PATH,
    OffloadingConnector,
    P2pFetch,
    P2pFound,
    P2pLookup,
)
from .options import Options
from .ranks import Ranks
from .sglang import ROOM_PATH, SWITCH_PATH, RoomCall, SglangConnector, SwitchCall

C = TypeVar("C", bound=msgspec.Struct)
Own = Callable[[web.Request], Coroutine[Any, Any, web.StreamResponse]]


class KvApi:
    """Routes for other engines. ``port`` tells on which they are found."""

    def __init__(self, options: Options, ranks: Ranks, port: Callable[[], int]) -> None:
        self._options = options
        self._ranks = ranks
        self._port = port

    def handlers(self) -> dict[tuple[str, str], Own]:
        """Return the handlers by method and path."""
        found: dict[tuple[str, str], Own] = {
            ("POST", FETCH_PATH): self._fetch,
            ("POST", RELEASE_PATH): self._release,
            ("POST", PULL_PATH): self._pull,
            ("POST", PUSH_PATH): self._push,
        }
        sends = self._options.role != "decode"
        if isinstance(self._ranks.workers[0].connector, MooncakeConnector) and sends:
            found["GET", QUERY_PATH] = self._query
        if isinstance(self._ranks.workers[0].connector, SglangConnector):
            found |= {("POST", ROOM_PATH): self._room, ("POST", SWITCH_PATH): self._switch}
        if isinstance(self._ranks.workers[0].connector, OffloadingConnector):
            found |= {("POST", P2P_FETCH_PATH): self._p2p_fetch, ("POST", P2P_LOOKUP_PATH): self._p2p_lookup}
        return found

    async def _room(self, request: web.Request) -> web.Response:
        """The meeting of P and D in SGLang."""
        call, [worker] = await _read(request, RoomCall), self._ranks.workers
        if call.release:
            worker.serve_release(FetchCall(worker.engine_id, sent_as(str(call.room))))
            return web.Response()
        return _answer(await worker.serve_pull(PullCall(worker.engine_id, str(call.room))))

    async def _switch(self, request: web.Request) -> web.Response:
        """SGLang's change of roles, of an engine that has nothing to do."""
        call, [worker] = await _read(request, SwitchCall), self._ranks.workers
        if worker.engine.running or worker.engine.queued:
            refusal = {"success": False, "message": "the server is not idle", "safe_to_restore": True}
            return web.json_response(refusal, status=400)
        assert isinstance(worker.connector, SglangConnector)
        worker.connector.switch(call.new_role)
        return web.json_response({"success": True, "message": f"the role is {call.new_role}"})

    async def _fetch(self, request: web.Request) -> web.Response:
        call = await _read(request, FetchCall)
        return _answer(self._ranks.of(call.engine_id).serve_fetch(call))

    async def _release(self, request: web.Request) -> web.Response:
        call = await _read(request, FetchCall)
        self._ranks.of(call.engine_id).serve_release(call)
        return web.Response()

    async def _pull(self, request: web.Request) -> web.Response:
        call = await _read(request, PullCall)
        return _answer(await self._ranks.of(call.engine_id).serve_pull(call))

    async def _push(self, request: web.Request) -> web.Response:
        self._ranks.workers[0].serve_push(await _read(request, PushCall))
        return web.Response()

    async def _p2p_fetch(self, request: web.Request) -> web.Response:
        reply = await self._ranks.workers[0].serve_p2p(await _read(request, P2pFetch))
        return _answer(reply)

    async def _p2p_lookup(self, request: web.Request) -> web.Response:
        hashes = (await _read(request, P2pLookup)).hashes
        blocks = len(self._ranks.workers[0].engine.pool.find(hashes, len(hashes)))
        return web.Response(body=msgspec.json.encode(P2pFound(blocks)))

    async def _query(self, request: web.Request) -> web.Response:
        """The bootstrap server of Mooncake."""
        ids = [each.engine_id for each in self._ranks.workers]
        return web.json_response(query_answer(ids, self._options.kv_host, self._port()))


async def _read(request: web.Request, kind: type[C]) -> C:
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except msgspec.DecodeError as error:
        raise web.HTTPBadRequest(text=str(error)) from error


def _answer(reply: FetchReply | None) -> web.Response:
    return web.Response(status=409) if reply is None else web.Response(body=msgspec.json.encode(reply))
