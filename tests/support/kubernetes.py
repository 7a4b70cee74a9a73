"""A Kubernetes API server of our own: list, pages, watch and bookmarks, and all that can go wrong with them.

What it answers is held to recordings of a real one by ``tests/discovery/kubernetes/test_recordings.py``.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import itertools
import json
import ssl
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

from tests.support.kubernetes_answers import answer, forbidden, line, status_of, too_large
from tests.support.kubernetes_objects import Json
from tests.support.kubernetes_selectors import matches

KINDS = {
    "pods": ("v1", "Pod"),
    "endpointslices": ("discovery.k8s.io/v1", "EndpointSlice"),
    "inferencepools": ("inference.networking.k8s.io/v1", "InferencePool"),
    "inferenceobjectives": ("llm-d.ai/v1alpha2", "InferenceObjective"),
    "inferencemodelrewrites": ("llm-d.ai/v1alpha2", "InferenceModelRewrite"),
}
OLD_OBJECTIVES = ("inference.networking.x-k8s.io/v1alpha2", "inferenceobjectives")

END, CUT = object(), object()
"""What ends a watch: in good order, or by the connection."""


@dataclass(frozen=True)
class Refusal:
    """An answer in place of the right one."""

    status: int
    body: bytes | Json = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Watcher:
    """A watch that is open."""

    kind: tuple[str, str]
    namespace: str
    labels: str
    fields: str
    queue: asyncio.Queue[object] = field(default_factory=asyncio.Queue)

    def sees(self, old: Json | None, new: Json | None, version: str) -> Json | None:
        """Return the event that a change is for this watch, if it is one."""
        before = old is not None and matches(old, self.labels, self.fields)
        if new is not None and matches(new, self.labels, self.fields):
            return {"type": "MODIFIED" if before else "ADDED", "object": new}
        if not before:
            return None
        last = copy.deepcopy(new if new is not None and old is None else old)
        assert last is not None
        last["metadata"]["resourceVersion"] = version
        return {"type": "DELETED", "object": last}


class ApiServer:
    """Serves objects of the namespaced kinds above, on a loopback port. ``async with`` starts it.

    Change it by :meth:`put`, :meth:`delete` and :meth:`remove`, and have it fail by the other methods.
    """

    def __init__(self, *, tls: ssl.SSLContext | None = None, port: int = 0) -> None:
        self.version = 100
        """The last resource version."""
        self.compacted = 0
        """Watches cannot begin before this version."""
        self.tokens: set[str] | None = None
        """Who may ask; ``None``: anybody."""
        self.forbidden: set[tuple[str, str]] = set()
        """Verbs (``list``, ``watch``) and kinds that nobody may ask for."""
        self.kinds: set[tuple[str, str]] = {(version, plural) for plural, (version, _) in KINDS.items()}
        self.bookmark_s = 3600.0
        self.mute = False
        """Whether watches tell nothing any more, though they stay open."""
        self.refusals: deque[Refusal] = deque()
        """What the next requests are answered."""
        self.refuse_all: Refusal | None = None
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        """Verb, kind and parameters of all that were answered or refused."""
        self.credentials: list[str | None] = []
        """The ``authorization`` of each request."""
        self._tls = tls
        self._port = port
        self._objects: dict[tuple[tuple[str, str], str, str], Json] = {}
        self._history: list[tuple[int, tuple[str, str], str, Json | None, Json | None]] = []
        self._pages: dict[str, tuple[list[Json], str]] = {}
        self._watchers: list[Watcher] = []
        self._runner: web.AppRunner | None = None
        self._uids = itertools.count(1)

    async def __aenter__(self) -> ApiServer:
        await self.up()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.down()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._port}"

    async def up(self) -> None:
        """Listen, after :meth:`down` on the same port."""
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port, ssl_context=self._tls).start()
        self._port = self._runner.addresses[0][1]

    async def down(self) -> None:
        """Listen no more, and close all connections."""
        if self._runner is not None:
            self.cut_watches()
            await self._runner.cleanup()
            self._runner = None

    def kubeconfig(self, path: Path, *, namespace: str = "llm", **user: Any) -> str:
        """Write a kubeconfig file for this server; return its path."""
        content = {
            "current-context": "here",
            "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": namespace}}],
            "clusters": [{"name": "c", "cluster": {"server": self.url}}],
            "users": [{"name": "u", "user": user}],
        }
        path.write_text(yaml.safe_dump(content))
        return str(path)

    # -- what there is

    def put(self, plural: str, found: Json, *, namespace: str = "llm", version: str | None = None) -> Json:
        """Create an object, or replace it; return it as it is then. ``version`` names another group."""
        kind = (version or KINDS[plural][0], plural)
        new = copy.deepcopy(found)
        metadata = new["metadata"]
        key = (kind, namespace, metadata["name"])
        old = self._objects.get(key)
        self.version += 1
        metadata["namespace"] = namespace
        metadata.setdefault("uid", old["metadata"]["uid"] if old else f"uid-{next(self._uids)}")
        metadata.setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
        metadata["resourceVersion"] = str(self.version)
        new = {"kind": KINDS[plural][1], "apiVersion": kind[0], **new}
        self._objects[key] = new
        self._happened(kind, namespace, old, new)
        return new

    def get(self, plural: str, name: str, *, namespace: str = "llm") -> Json:
        """Return a copy of an object, to change it and put it back."""
        return copy.deepcopy(self._objects[(KINDS[plural][0], plural), namespace, name])

    def delete(self, plural: str, name: str, *, namespace: str = "llm") -> None:
        """Begin to delete a pod: it has a grace period."""
        found = self.get(plural, name, namespace=namespace)
        found["metadata"]["deletionTimestamp"] = "2026-01-01T00:01:00Z"
        found["metadata"]["deletionGracePeriodSeconds"] = 60
        self.put(plural, found, namespace=namespace)

    def remove(self, plural: str, name: str, *, namespace: str = "llm", version: str | None = None) -> None:
        """Have an object no more."""
        kind = (version or KINDS[plural][0], plural)
        old = self._objects.pop((kind, namespace, name))
        self.version += 1
        self._happened(kind, namespace, old, None)

    def names(self, plural: str) -> set[str]:
        return {name for (_, kind), _, name in self._objects if kind == plural}

    def _happened(self, kind: tuple[str, str], namespace: str, old: Json | None, new: Json | None) -> None:
        self._history.append((self.version, kind, namespace, old, new))
        for watcher in self._watchers:
            if (watcher.kind, watcher.namespace) == (kind, namespace) and not self.mute:
                event = watcher.sees(old, new, str(self.version))
                if event is not None:
                    watcher.queue.put_nowait(line(event))

    # -- what goes wrong

    def compact(self) -> None:
        """Forget what has happened: whoever wants to watch from before must list anew."""
        self.compacted = self.version
        self._pages.clear()

    def expire(self) -> None:
        """Have all watches end since what they tell is too old: whoever watches must list anew."""
        self.send(
            line({"type": "ERROR", "object": status_of(410, "Expired", "too old resource version")}), END
        )

    def end_watches(self) -> None:
        self.send(END)

    def cut_watches(self) -> None:
        self.send(CUT)

    def send(self, *items: object) -> None:
        """Send bytes, or what ends it, on each watch that is open."""
        for watcher in self._watchers:
            for item in items:
                watcher.queue.put_nowait(item)

    @property
    def watches(self) -> int:
        """How many are open."""
        return len(self._watchers)

    def asked(self, verb: str, plural: str | None = None) -> int:
        """Return how many requests of a kind there were."""
        return sum(each[0] == verb and plural in (None, each[1]) for each in self.requests)

    # -- what is answered

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        parameters = dict(request.query)
        parts = request.path.strip("/").split("/")
        version, rest = ("v1", parts[2:]) if parts[0] == "api" else ("/".join(parts[1:3]), parts[3:])
        namespace, plural, name = [*rest[1:], "", "", ""][:3]
        kind = (version, plural)
        verb = "get" if name else "watch" if parameters.get("watch") in ("1", "true") else "list"
        self.requests.append((verb, plural, parameters))
        self.credentials.append(request.headers.get("authorization"))
        refusal = self.refusals.popleft() if self.refusals else self.refuse_all
        if refusal is not None:
            body = refusal.body if isinstance(refusal.body, bytes) else line(refusal.body)
            return web.Response(status=refusal.status, body=body, headers=refusal.headers)
        token = (request.headers.get("authorization") or "").removeprefix("Bearer ")
        if self.tokens is not None and token not in self.tokens:
            return answer(status_of(401, "Unauthorized", "Unauthorized"))
        if kind not in self.kinds:
            return web.Response(status=404, text="404 page not found\n")
        if (verb, plural) in self.forbidden:
            return answer(forbidden(verb, version.rpartition("/")[0], plural, namespace))
        if name:
            return self._one(kind, namespace, name)
        at = parameters.get("resourceVersion", "")
        if at and not at.isdecimal():
            text = (
                f'resourceVersion: Invalid value: "{at}": strconv.ParseUint: parsing "{at}": invalid syntax'
            )
            return answer(status_of(500, None, text))
        if verb == "watch":
            return await self._watch(request, kind, namespace, parameters)
        if at and int(at) > self.version:
            return answer(too_large(int(at), self.version), {"retry-after": "1"})
        return self._list(kind, namespace, parameters)

    def _one(self, kind: tuple[str, str], namespace: str, name: str) -> web.Response:
        found = self._objects.get((kind, namespace, name))
        if found is not None:
            return answer(found)
        group = kind[0].rpartition("/")[0]
        text = f'{kind[1]}{"." + group if group else ""} "{name}" not found'
        details = {"name": name, **({"group": group} if group else {}), "kind": kind[1]}
        return answer(status_of(404, "NotFound", text, details=details))

    def _now(self, kind: tuple[str, str], namespace: str, parameters: dict[str, str]) -> Iterator[Json]:
        labels, fields = parameters.get("labelSelector", ""), parameters.get("fieldSelector", "")
        for (its_kind, its_namespace, _), found in sorted(self._objects.items()):
            if (its_kind, its_namespace) == (kind, namespace) and matches(found, labels, fields):
                yield found

    def _list(self, kind: tuple[str, str], namespace: str, parameters: dict[str, str]) -> web.Response:
        if token := parameters.get("continue"):
            if token not in self._pages:
                text = "The provided continue parameter is too old to display a consistent list result."
                return answer(status_of(410, "Expired", text))
            left, version = self._pages[token]
        else:
            left, version = list(self._now(kind, namespace, parameters)), str(self.version)
        size = int(parameters.get("limit", "0")) or len(left)
        page, left = left[:size], left[size:]
        metadata: Json = {"resourceVersion": version}
        if left:
            start = page[-1]["metadata"]["name"] + "\0"
            token = json.dumps(
                {"v": "meta.k8s.io/v1", "rv": int(version), "start": start}, separators=(",", ":")
            )
            metadata["continue"] = base64.b64encode(token.encode()).decode().rstrip("=")
            metadata["remainingItemCount"] = len(left)
            self._pages[metadata["continue"]] = (left, version)
        singular = KINDS[kind[1]][1]
        own = () if singular in ("Pod", "EndpointSlice") else ("kind", "apiVersion")
        items = [
            {key: value for key, value in each.items() if key not in ("kind", "apiVersion") or key in own}
            for each in page
        ]
        return answer(
            {"kind": f"{singular}List", "apiVersion": kind[0], "metadata": metadata, "items": items}
        )

    async def _watch(
        self, request: web.Request, kind: tuple[str, str], namespace: str, parameters: dict[str, str]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "application/json"})
        await response.prepare(request)
        watcher = Watcher(
            kind, namespace, parameters.get("labelSelector", ""), parameters.get("fieldSelector", "")
        )
        for item in self._backlog(watcher, parameters):
            watcher.queue.put_nowait(item)
        self._watchers.append(watcher)
        bookmarks = parameters.get("allowWatchBookmarks") == "true"
        until = asyncio.get_running_loop().time() + int(parameters.get("timeoutSeconds", "3600"))
        try:
            await self._serve(response, watcher, until, bookmarks)
        except ConnectionResetError:
            return response
        finally:
            self._watchers.remove(watcher)
        return response

    async def _serve(
        self, response: web.StreamResponse, watcher: Watcher, until: float, bookmarks: bool
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            left = until - loop.time()
            try:
                async with asyncio.timeout(max(0.0, min(left, self.bookmark_s))):
                    item = await watcher.queue.get()
            except TimeoutError:
                if bookmarks and not self.mute:
                    await response.write(self._bookmark(watcher.kind))
                if loop.time() >= until:
                    return
                continue
            if item is CUT:
                transport = response._req.transport if response._req is not None else None
                if transport is not None:
                    transport.abort()
                return
            if item is END:
                return
            assert isinstance(item, bytes)
            await response.write(item)

    def _backlog(self, watcher: Watcher, parameters: dict[str, str]) -> Iterator[object]:
        """Yield what a watch is told at first."""
        at = int(parameters.get("resourceVersion") or 0)
        if parameters.get("sendInitialEvents") == "true":
            text = (
                "a watch stream was requested by the client but the required storage feature"
                " RequestWatchProgress is disabled"
            )
            yield line({"type": "ERROR", "object": status_of(500, "InternalError", text)})
            yield END
        elif not at:
            for found in self._now(watcher.kind, watcher.namespace, parameters):
                yield line({"type": "ADDED", "object": found})
        elif at < self.compacted:
            text = f"too old resource version: {at} ({self.compacted})"
            yield line({"type": "ERROR", "object": status_of(410, "Expired", text)})
            yield END
        for version, kind, namespace, old, new in self._history:
            if at and version > at and (kind, namespace) == (watcher.kind, watcher.namespace):
                event = watcher.sees(old, new, str(version))
                if event is not None:
                    yield line(event)

    def _bookmark(self, kind: tuple[str, str]) -> bytes:
        name = KINDS[kind[1]][1]
        empty: Json = {"spec": {"containers": None}, "status": {}} if name == "Pod" else {}
        metadata = {"resourceVersion": str(self.version)}
        found = {"kind": name, "apiVersion": kind[0], "metadata": metadata, **empty}
        return line({"type": "BOOKMARK", "object": found})
