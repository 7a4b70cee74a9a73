"""A Docker engine's HTTP API on a Unix socket: containers as a test says, and the faults that it chooses.

What it lists and tells has the shape of what a real engine answers (API 1.41).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import web

ROLE = "vllm-pd.role"


def container(
    name: str,
    role: str | None = "decode",
    *,
    port: str | None = None,
    networks: dict[str, str] | None = None,
    mode: str = "llm",
    health: str = "none",
    state: str = "running",
    ports: list[dict[str, Any]] | None = None,
    **labels: str,
) -> dict[str, Any]:
    """Return an entry of a list of containers, by default one D in one network."""
    found = {f"vllm-pd.{key.replace('_', '-')}": value for key, value in labels.items()}
    found |= {} if role is None else {ROLE: role}
    found |= {} if port is None else {"vllm-pd.port": port}
    attached = {"llm": "172.20.0.2"} if networks is None else networks
    return {
        "Id": name.ljust(64, "0"),
        "Names": [f"/other/{name}", f"/{name}"],
        "Labels": found,
        "State": state,
        "Health": health,  # for the filter below: engines of this API do not list it
        "Ports": [] if ports is None else ports,
        "HostConfig": {"NetworkMode": mode},
        "NetworkSettings": {
            "Networks": {key: {"IPAddress": at, "GlobalIPv6Address": ""} for key, at in attached.items()}
        },
    }


class DockerApi:
    """The engine."""

    def __init__(self, path: Path) -> None:
        self.url = f"unix://{path}"
        self.containers: list[dict[str, Any]] = []
        self.stop_signals: dict[str, str] = {}
        """Of containers that have one of their own, by name."""
        self.fault: str | None = None
        """What becomes of every call: ``500``, ``half``, ``nonsense``, ``hangs``."""
        self.events_fault: str | None = None
        """What becomes of calls for events: ``403``, ``nonsense``."""
        self.calls: list[str] = []
        self.listeners: list[asyncio.Queue[bytes | None]] = []
        self.since: list[str | None] = []
        self._nanoseconds = 1_700_000_000_000_000_000

    def tell(self, action: str, name: str, kind: str = "container", **attributes: str) -> None:
        """Send an event to all who listen."""
        self._nanoseconds += 1_000_000
        key = name.ljust(64, "0")
        actor = {"ID": key, "Attributes": {ROLE: "decode", "name": name, **attributes}}
        if kind == "network":
            actor = {"ID": "f" * 64, "Attributes": {"container": key, "name": "llm"}}
        event = {
            "Type": kind,
            "Action": action,
            "Actor": actor,
            "time": self._nanoseconds // 10**9,
            "timeNano": self._nanoseconds,
        }
        for each in self.listeners:
            each.put_nowait(json.dumps(event).encode() + b"\n")

    def set(self, *containers: dict[str, Any], quiet: bool = False) -> None:
        """Have these containers, and say that something has happened."""
        self.containers = list(containers)
        if not quiet:
            self.tell("start", "some")

    def hang_up(self) -> None:
        """End all streams of events."""
        for each in self.listeners:
            each.put_nowait(None)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path.rpartition("/v1.41")[2]
        self.calls.append(path)
        if self.fault == "hangs":
            await asyncio.sleep(60)
        if self.fault == "500":
            return web.json_response({"message": "out of order"}, status=500)
        if path == "/version":
            return web.json_response({"ApiVersion": "1.41", "Version": "20.10"})
        if self.fault == "half":
            return web.Response(body=b'[{"Id": "', content_type="application/json")
        if path == "/events":
            return await self._events(request)
        if self.fault == "nonsense":
            return web.json_response({"Id": 1})
        if path == "/containers/json":
            return web.json_response(self._listed(json.loads(request.query["filters"])))
        key = path.split("/")[2]
        own = next((each for name, each in self.stop_signals.items() if name.ljust(64, "0") == key), None)
        return web.json_response({"Id": key, "Config": {"StopSignal": own} if own else {}})

    def _listed(self, filters: dict[str, list[str]]) -> list[dict[str, Any]]:
        (label,) = filters["label"]
        return [
            each
            for each in self.containers
            if not isinstance(each, dict)
            or (
                label in (each.get("Labels") or {label: ""})
                and each.get("State", "running") in filters["status"]
                and each.get("Health", "none") in filters["health"]
            )
        ]

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if self.events_fault == "403":
            return web.json_response({"message": "not here"}, status=403)
        self.since.append(request.query.get("since"))
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        if self.events_fault == "nonsense":
            await response.write(b'{"Type": 1}\n')
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.listeners.append(queue)
        try:
            while (data := await queue.get()) is not None:
                await response.write(data)
        finally:
            self.listeners.remove(queue)
        return response


@contextlib.asynccontextmanager
async def docker_api(path: Path, tls: ssl.SSLContext | None = None) -> AsyncIterator[DockerApi]:
    """Run an engine's API in this event loop: at a socket or, with ``tls``, at a port of 127.0.0.1."""
    api = DockerApi(path)
    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", api.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    try:
        if tls is None:
            await web.UnixSite(runner, str(path)).start()
        else:
            await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
            api.url = f"tcp://localhost:{runner.addresses[0][1]}"
        yield api
    finally:
        api.hang_up()
        await runner.cleanup()
