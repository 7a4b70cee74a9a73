"""How simulated instances hand over encoded media items: vLLM's EC connectors, with their traps.

An encoding is known by the hash of its item's content, whichever API that came by. ``cpu`` is
``ECCPUConnector``: the encode instance answers ``ec_transfer_params``, by hash, and the others fetch from
where that says. ``example`` is ``ECExampleConnector``: encodings are files that all share.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from .handoff import FatalHandOff
from .options import Options

PATH = "/_sim/encodings/{hash}"
"""Where an encode instance gives out its encodings, in place of NIXL."""

_METADATA = "c2ltLWFnZW50"
_SIZE = 4096


def media_hashes(messages: list[dict[str, Any]], options: Any = None) -> list[str]:
    """Return the hash of each media item; ``options`` are the request's ``mm_processor_kwargs``."""
    return [sha256(repr((content, options)).encode()).hexdigest() for content in _contents(messages)]


def _contents(messages: list[dict[str, Any]]) -> Iterator[str]:
    for message in messages:
        parts = message.get("content")
        for part in parts if isinstance(parts, list) else ():
            match part:
                case {"type": "image_url", "image_url": {"url": url}}:
                    yield str(url)
                case {"type": "video_url", "video_url": {"url": url}}:
                    yield str(url)
                case {"type": "audio_url", "audio_url": {"url": url}}:
                    yield str(url)
                case {"type": "input_audio", "input_audio": audio}:
                    yield str(audio)
                case {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}}:
                    yield f"data:{kind};base64,{data}"  # as vLLM makes one of the other
                case {"type": "image", "source": {"url": url}}:
                    yield str(url)


class Encodings:
    """The encodings that an instance has. ``port`` tells where others fetch them."""

    def __init__(self, options: Options, port: Callable[[], int]) -> None:
        self.counts: Counter[str] = Counter()
        """Items that were ``encoded`` here, ``fetched`` from elsewhere, and ``cached`` here already."""
        self._options = options
        self._port = port
        self._known: set[str] = set()

    async def have(self, hashes: list[str], params: dict[str, Any] | None) -> None:
        """Get the encodings of a request's items: those that are not found elsewhere are computed.

        Raises :exc:`.handoff.FatalHandOff` for ``ec_transfer_params`` that end vLLM's engine.
        """
        for each in hashes:
            if each in self._known:
                self.counts["cached"] += 1
            elif await self._found(each, params or {}):
                self.counts["fetched"] += 1
            else:
                self.counts["encoded"] += 1
                if (directory := self._storage()) is not None and self._options.role == "encode":
                    (directory / each).touch()
            self._known.add(each)

    def answer(self, hashes: list[str]) -> dict[str, Any] | None:
        """Return the ``ec_transfer_params`` of an answer."""
        if self._options.role != "encode" or self._options.ec_connector != "cpu":
            return None
        where = {"peer_host": self._options.kv_host, "peer_port": self._port(), "size_bytes": _SIZE}
        return {each: {**where, "nixl_agent_metadata_b64": _METADATA} for each in hashes} or None

    async def give(self, request: web.Request) -> web.Response:
        """Answer another instance that fetches an encoding."""
        return web.Response(status=200 if request.path.rpartition("/")[2] in self._known else 404)

    def _storage(self) -> Path | None:
        return None if self._options.ec_storage is None else Path(self._options.ec_storage)

    async def _found(self, each: str, params: dict[str, Any]) -> bool:
        if self._options.role == "encode":
            return False
        if self._options.ec_connector == "example":
            directory = self._storage()
            return directory is not None and (directory / each).exists()
        info = params.get(each)
        if self._options.ec_connector != "cpu" or info is None:
            return False
        if not isinstance(info, dict) or not str(info.get("size_bytes", -1)).lstrip("-").isdigit():
            raise FatalHandOff("'ec_transfer_params' has something else than objects")
        if int(info.get("size_bytes", -1)) != _SIZE:
            return False
        url = f"http://{info.get('peer_host')}:{info.get('peer_port')}{PATH.format(hash=each)}"
        try:
            timeout = aiohttp.ClientTimeout(total=5)
            async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as response:
                return response.status == 200
        except (TimeoutError, aiohttp.ClientError, ValueError):
            return False
